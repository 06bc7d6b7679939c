"""Export grounding vision-language models with static token pruning and GAP position IDs.

import gap_export

result = gap_export.export("refshapes", ratios=[0.25, 0.5], out="bundle")
print(result.folder, result.report.passed)
"""

import lazy_loader

__version__ = "0.1.0"
# The public names stand in __init__.pyi; each is imported when it is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
