"""Bundles behind HTTP: one worker, a bounded queue, OpenAI's form of chat, metrics and a page."""
