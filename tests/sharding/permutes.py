"""The permutes that a compiled program holds, and those that it should hold."""

import re

import jax

from jmoe.sharding.exchange import Exchange


def permutes_of(lowered: jax.stages.Lowered) -> list[str]:
    """The (source, target) pairs of every permute, in the order in which the compiled program runs them."""
    text = lowered.compile().as_text()
    assert text and "is_scheduled=true" in text, "else the order of lines says nothing"
    return re.findall(r"collective-permute(?:-start)?\(.*?source_target_pairs=(\{\{.*?\}\})", text)


def expected_permutes(exchange: Exchange, walk) -> list[str]:
    """One a round for every (dispatch, combine) of the walk."""
    found = []
    for dispatch, combine in walk:
        for pairs in exchange.rounds.pairs:
            both = (list(pairs) if dispatch else []) + ([(e, a) for a, e in pairs] if combine else [])
            found.append("{" + ",".join(f"{{{s},{t}}}" for s, t in both) + "}")
    return found
