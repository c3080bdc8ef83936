"""The program `deconstruct`: one verb per job. A verb's module is imported only when it is called."""

from __future__ import annotations

import argparse
import errno
import importlib
import logging
import os
import signal
import sys
import threading
from typing import Any, NoReturn

from deconstruct.types import RunError, UserError

# Verb -> (module with add_arguments(parser) and run(arguments) -> exit status, what it does).
VERBS = {
    "prepare": ("deconstruct.data.prepare", "turn text into a tokenizer and packed training rows"),
    "train": ("deconstruct.train.loop", "train, or resume, a model from a config file"),
    "status": ("deconstruct.run.status", "show how far runs are, whether they live, and where their time went"),
    "evaluate": ("deconstruct.evaluate.follower", "measure a run's checkpoints: perplexity and other tasks"),
    "report": ("deconstruct.report.command", "say what a run has learned, or make a page of a folder of runs"),
    "table": ("deconstruct.evaluate.table", "show runs side by side: perplexity by context, and what differs"),
    "compare": ("deconstruct.compare.command", "compare configurations over seeds: differences with intervals"),
    "describe": ("deconstruct.costs.describe", "show a config's layers, parameters, FLOPs and cache, without training"),
    "compile": (
        "deconstruct.compile.command",
        "compile a run's programs for TPUs or GPUs that are not here",
    ),
    "generate": ("deconstruct.generation.command", "continue prompts with a run's model"),
    "import": (
        "deconstruct.interop.import_checkpoint",
        "make a workdir of a Hugging Face checkpoint (qwen2, qwen3), or a hybrid of it",
    ),
    "export": ("deconstruct.interop.export_checkpoint", "write a checkpoint of a workdir as Hugging Face safetensors"),
    "draw": ("deconstruct.draw.command", "draw attention maps and training losses of runs"),
    "bench": ("deconstruct.bench.command", "measure the speed of training and decoding, alone or beside transformers"),
}
USER_ERROR, FAILURE, INTERRUPTED = 2, 1, 130


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other mistake of the user is said."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(words: list[str] | None = None) -> int:
    """Runs one verb. Exit status: 0 done, 2 the user's mistake (one line), 1 a failure, 75 stopped and saved."""
    try:
        if words is None:  # of the program, and not of a process that calls it
            sys.unraisablehook = _failed_callback
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                signal.signal(signal.SIGINT, _interrupted)
        return _main(sys.argv[1:] if words is None else words)
    except KeyboardInterrupt:
        sys.stdout.flush()
        _interrupted()


def _interrupted(*_: object) -> NoReturn:
    """Ends at once: threads of the runtime may be at work, and taking it down under them can crash. As a handler while
    modules are imported: of a KeyboardInterrupt raised there, an extension makes an error of its own."""
    os.write(2, b"deconstruct: interrupted\n")
    os._exit(INTERRUPTED)


def _main(words: list[str]) -> int:
    overrides = [word for word in words if word.startswith("--config.")]
    rest = [word for word in words if not word.startswith("--config.")]
    parser = Parser(prog="deconstruct", description="Language models with attention taken apart.", allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verb = next((word for word in rest if not word.startswith("-")), None)
    for name, (module, what) in VERBS.items():
        own = verbs.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".", allow_abbrev=False)
        if name == verb:
            importlib.import_module(module).add_arguments(own)
    arguments = parser.parse_args(rest, argparse.Namespace(overrides=overrides))
    if signal.getsignal(signal.SIGINT) is _interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on there is something to clean up
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    for noisy in ("jax", "orbax"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    for noisy in ("absl", "asyncio"):  # of a save or a load that fails, they tell at length what we say in a line
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    threading.excepthook = _failed_thread
    try:
        if overrides and verb not in ("train", "describe", "compile"):
            raise UserError(f"{overrides[0]}: {verb} takes no --config.key=value")
        return importlib.import_module(VERBS[arguments.verb][0]).run(arguments)
    except UserError as error:
        print(f"deconstruct {arguments.verb}: {error}", file=sys.stderr)
        return USER_ERROR
    except (FloatingPointError, RunError) as error:
        print(f"deconstruct {arguments.verb}: {error}", file=sys.stderr)
        return FAILURE
    except BrokenPipeError:  # the reader of a pipe went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except OSError as error:  # a full disk, a folder that cannot be written to, a file where a folder should be
        of_the_disk = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
        if error.errno is None or (error.filename is None and not of_the_disk):
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"deconstruct {arguments.verb}: {where}{os.strerror(error.errno)}", file=sys.stderr)
        return FAILURE if of_the_disk else USER_ERROR
    except Exception as error:
        if not _out_of_memory(error):
            raise
        why = str(error).strip().splitlines()[:1] or ["Python"]
        print(f"deconstruct {arguments.verb}: out of memory ({why[0]}); smaller numbers would do", file=sys.stderr)
        return FAILURE


def _failed_thread(failure: threading.ExceptHookArgs) -> None:
    """A thread of a library that could not write (TensorBoard's, on a full disk) says so in a line."""
    if isinstance(failure.exc_value, OSError):
        print(f"deconstruct: {failure.thread and failure.thread.name}: {failure.exc_value}", file=sys.stderr)
    else:
        threading.__excepthook__(failure)


def _failed_callback(failure: Any) -> None:
    """Of the reads of a damaged checkpoint, those that end after the first has failed find the event loop of Orbax
    closed, and would each say so in a traceback."""
    if str(failure.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(failure)


def _out_of_memory(error: Exception) -> bool:
    """Whether an array could not be had, from Python, NumPy or XLA (whose error is known by its name, without JAX)."""
    of_xla = type(error).__name__ == "JaxRuntimeError" and str(error).startswith("RESOURCE_EXHAUSTED")
    return of_xla or isinstance(error, MemoryError)


if __name__ == "__main__":
    sys.exit(main())
