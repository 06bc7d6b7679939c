"""What results are compared with: formulas and models written down a second time."""
