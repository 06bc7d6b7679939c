"""Kinds of machines that bundles are made for, and what this machine is."""
