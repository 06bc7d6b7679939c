"""Export grounding vision-language models with static token pruning and GAP position IDs."""

from typing import Final

__version__: Final = "0.1.0"
