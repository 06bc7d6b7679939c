"""What OpenVINO says when something fails."""


def first_words(error: RuntimeError) -> str:
    """The end of OpenVINO's message, which begins with its own source files."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if not line.startswith(("Exception from", "Check '"))]
    return " ".join((said or lines or ["it gave no reason"])[-1].split())[:300]
