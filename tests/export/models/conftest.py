"""Every family's files, plan, bundle and references; made once."""

import pytest
import sentencepiece
from makers.families import FAMILIES, export, find_family
from truths.families import find_truth

from gap_runtime import Bundle


@pytest.fixture(scope="module")
def find(tmp_path_factory):
    return lambda name: find_family(name, tmp_path_factory)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, find):
    return find(request.param)


@pytest.fixture(scope="module")
def truth(case):
    return find_truth(case)


@pytest.fixture(scope="module")
def plan(case, tmp_path_factory):
    """Of an unpruned export that reads phrases, so that all parts are there."""
    out = tmp_path_factory.mktemp("models") / "bundle"
    return case.plan(out, pruner="text_similarity", prune__ratios=[0])


@pytest.fixture(scope="module")
def bundle(plan):
    export(plan)
    return Bundle.open(plan.out)


@pytest.fixture(scope="module")
def eager(plan):
    return plan.family.load_eager(plan.checkpoint, plan.spec, "float32")


@pytest.fixture(scope="module")
def read(case):
    """The tokenizer of SentencePiece's own library, where the family has its file."""
    folder = case.place("language") if case.name == "minigpt-v2" else case.place()
    if not (folder / "tokenizer.model").is_file():
        return None
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
