"""Ground phrases in pictures with an exported bundle, without torch.

from gap_runtime import Bundle, Grounder

with Grounder(Bundle.open("refshapes-32of64")) as grounder:
    found = grounder.ground("photo.png", "the red circle")
print(found.boxes, found.score)
"""

import lazy_loader

__version__ = "0.1.0"
# The public names stand in __init__.pyi; each is imported when it is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
