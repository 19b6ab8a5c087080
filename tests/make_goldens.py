"""Writes tests/goldens/: small Hugging Face checkpoints with the logits and greedy tokens that transformers gives them.

Run from the repository root, in an environment with the `oracle` extra: `python tests/make_goldens.py`. Each case
takes the first seed whose 64 greedy tokens are varied and chosen by clear margins, so that equal tokens mean something.
"""

import dataclasses
import json
import pathlib
import shutil
import sys

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from transformers_cases import CASES, NUM_STEPS, Case, build, greedy, prompt_of

FOLDER = pathlib.Path(__file__).parent / "goldens"
MIN_MARGIN = 5e-3  # between the best and the second logit, at every step: 50 times the tolerance
MIN_DISTINCT = 24  # different tokens among the 64


def main() -> None:
    for case in CASES:
        for seed in range(100):
            chosen = dataclasses.replace(case, seed=seed)
            model, prompt = build(chosen), prompt_of(chosen)
            logits, tokens = greedy(model, prompt, NUM_STEPS)
            top = logits[-NUM_STEPS:].topk(2).values
            margin, distinct = float((top[:, 0] - top[:, 1]).min()), len(set(tokens.tolist()))
            if margin >= MIN_MARGIN and distinct >= MIN_DISTINCT:
                break
        else:
            raise SystemExit(f"{case.name}: no seed below 100 gives clear and varied tokens")
        write(chosen, model, prompt, logits, tokens, {"min_margin": margin, "distinct_tokens": distinct})
        largest = float(logits.abs().max())
        print(f"{case.name}: seed {seed}, margin {margin:.4f}, {distinct} different tokens, |logits| <= {largest:.1f}")


def write(case: Case, model, prompt, logits, tokens, facts: dict) -> None:
    """One folder: the checkpoint, `golden.safetensors` and what made it."""
    # The cached steps against one pass over everything: transformers must agree with itself.
    with torch.no_grad():
        whole = model(torch.cat([prompt[0], tokens[:-1]])[None]).logits[0]
    torch.testing.assert_close(whole, logits, atol=5e-5, rtol=0)
    folder = FOLDER / case.name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, max_shard_size=case.max_shard_size)
    arrays = {"prompt": prompt[0].numpy(), "tokens": tokens.numpy()}
    arrays = {name: array.astype(np.int32) for name, array in arrays.items()} | {"logits": logits.numpy()}
    save_file(arrays, folder / "golden.safetensors")
    facts |= {"seed": case.seed, "transformers": transformers.__version__, "torch": torch.__version__}
    (folder / "golden.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
