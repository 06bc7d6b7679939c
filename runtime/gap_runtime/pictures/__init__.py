"""Pictures become pixels, answers become boxes, and boxes are drawn."""
