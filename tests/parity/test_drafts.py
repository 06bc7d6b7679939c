"""Drafts of the embedded model's own answers: what they learn on the way changes none."""

from gap_runtime import Bundle, Grounder
from gap_runtime.evaluation.refshapes256 import draw_scene


def test_what_is_guessed_by_sizes_saves_calls_and_changes_no_answer(refshapes_bundle):
    bundle = Bundle.open(refshapes_bundle)
    drafted, plain = [], []
    with Grounder(bundle) as one, Grounder(bundle, draft=False) as other:
        for number in range(30):
            scene = draw_scene("test", number)
            views = one.look(scene.image), other.look(scene.image)
            for question in scene.questions:
                answers = [view.ground(question.phrase) for view in views]
                drafted.append(answers[0])
                plain.append(answers[1])
    assert [each.token_ids for each in drafted] == [each.token_ids for each in plain]
    # Some guesses save a call, and some are refused.
    assert sum(each.calls for each in drafted[-40:]) < 40 * (drafted[1].calls - 1)
    assert any(each.accepted < each.drafted for each in drafted[20:])


def test_a_box_asked_for_again_and_again_is_no_size_to_guess_by(refshapes_bundle):
    """As `bench` and `check` make it: they would be shown calls that no user gets."""
    scene = draw_scene("test", 0)
    with Grounder(Bundle.open(refshapes_bundle)) as grounder:
        view, entry = grounder.look(scene.image), grounder.default_ratio
        phrase = scene.questions[0].phrase
        calls = [grounder.run_stages(view, phrase, entry).decoded.calls for _ in range(12)]
        # The first one tells how answers begin.
        assert len(set(calls[1:])) == 1
        for _ in range(8):
            view.ground(phrase)
        assert grounder.run_stages(view, phrase, entry).decoded.calls < calls[-1]
