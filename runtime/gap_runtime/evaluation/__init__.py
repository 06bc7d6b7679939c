"""Referring expression comprehension: data, protocols, scores and the long run over them."""
