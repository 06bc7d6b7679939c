# The public names of the package: for type checkers, and for lazy_loader.
from .errors import GapError as GapError
from .pipeline.api import export as export
from .pipeline.result import ExportResult as ExportResult

__version__: str
