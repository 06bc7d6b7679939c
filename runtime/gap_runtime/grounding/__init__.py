"""A phrase and a picture become boxes, and are compared with PyTorch's."""
