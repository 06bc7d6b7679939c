"""What a plug-in has to be: families, pruners, dialects, and what passes between them."""
