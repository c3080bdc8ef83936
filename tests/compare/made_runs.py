"""Workdirs as `compare` reads them, of losses that are drawn and not trained: what is tested is the statistics."""

import json

import numpy as np

from deconstruct.evaluate.evaluation import Item
from deconstruct.evaluate.items import write_items
from deconstruct.run.workdir import Workdir
from tests.tiny import tiny_config

PLAIN = {"text": "validation", "windows": "non-overlapping", "max_tokens": 0, "skip": ""}
TOKENS = np.random.default_rng(9).integers(20, 200, 40)  # of 40 documents


def made_run(folder, *, losses, context=8, step=4, skip="", logged=(), keep_items=True, **config):
    """`losses`: nats a token, of each of the 40 documents. Called again, it adds another measurement."""
    run_dir = Workdir(folder)
    if not folder.exists():
        folder.mkdir(parents=True)
        run_dir.write_config(tiny_config(config.pop("model", None), **config))
        lines = [{"step": i, "loss": loss, "seconds": {"step": 0.5}} for i, loss in enumerate(logged, 1)]
        run_dir.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    setting = {"context": context, "stride": context, **PLAIN, "skip": skip}
    losses = np.broadcast_to(losses, TOKENS.shape)
    if keep_items:
        items = [
            Item(number, None, [-float(loss * tokens)], {"tokens": int(tokens)})
            for number, (loss, tokens) in enumerate(zip(losses, TOKENS, strict=True))
        ]
        write_items(run_dir, step, "perplexity", setting, items)
    nll = float((losses * TOKENS).sum() / TOKENS.sum())
    values = {"nll": nll, "perplexity": float(np.exp(nll))}
    add_records(folder, [{"task": "perplexity", "metric": m, "value": v, **setting} for m, v in values.items()], step)
    return folder


def add_records(folder, records, step=4):
    with Workdir(folder).evaluations.open("a") as out:
        out.writelines(json.dumps({"step": step, **record}) + "\n" for record in records)
