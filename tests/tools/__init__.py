"""Helpers of tests: engines, a browser, a comparison of exported files."""
