"""Workdirs as `compare` reads them, of losses that are drawn and not trained: what is tested is the statistics."""

import gzip
import json

import numpy as np

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
    nll = float((losses * TOKENS).sum() / TOKENS.sum())
    values = {"nll": nll, "perplexity": float(np.exp(nll))}
    records = [{"task": "perplexity", "metric": metric, "value": value, **setting} for metric, value in values.items()]
    if keep_items:
        rows = zip(losses.tolist(), TOKENS.tolist(), strict=True)
        items = [{"id": i, "logliks": [-loss * tokens], "tokens": tokens} for i, (loss, tokens) in enumerate(rows)]
        keep(folder, records[-1], items, f"{step}.perplexity.context_{context}.skip_{skip}")
    add_records(folder, records, step)
    return folder


def keep(folder, record, items, name):
    (folder / "eval_items").mkdir(exist_ok=True)
    record["items_file"] = f"eval_items/{name}.jsonl.gz"
    (folder / record["items_file"]).write_bytes(gzip.compress("".join(json.dumps(i) + "\n" for i in items).encode()))


def add_records(folder, records, step=4):
    with Workdir(folder).evaluations.open("a") as out:
        out.writelines(json.dumps({"step": step, **record}) + "\n" for record in records)
