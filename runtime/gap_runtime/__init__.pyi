# The public names of the package: for type checkers, and for lazy_loader.
from .bundle.bundle import Bundle as Bundle
from .errors import GapError as GapError
from .evaluation.api import Evaluation as Evaluation
from .evaluation.api import evaluate as evaluate
from .grounding.api import check as check
from .grounding.api import draw as draw
from .grounding.check import CheckReport as CheckReport
from .grounding.grounder import Grounder as Grounder
from .grounding.video.watch import (
    WatchedFrame as WatchedFrame,
)
from .grounding.video.watch import (
    WatchReport as WatchReport,
)
from .grounding.video.watch import (
    watch as watch,
)
from .grounding.view import Grounding as Grounding
from .grounding.view import View as View
from .pictures.boxes import Box as Box

__version__: str
