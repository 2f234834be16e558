"""kvcapsule-chat: answer on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from ..runtime import program
from ..runtime.errors import KVCapsuleError
from ..runtime.pictures import Budget, Picture, load
from . import args, stats
from .args import Options
from .devices import list_devices
from .engine import Engine, say
from .progress import Progress
from .repl import Repl
from .session import Session, Turn


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 answered, 1 error (one line on stderr), 2 wrong command line, 130 Ctrl-C."""
    return program.run("kvcapsule-chat", lambda: run(args.parse(sys.argv[1:] if argv is None else argv)))


def run(options: Options) -> int:
    if options.list_devices:
        list_devices(options)
        return 0
    # before the model, which takes longer
    if "-" in options.images and options.prompt is None:
        raise KVCapsuleError("--image - reads the picture from stdin, so the question must come with -p")
    budget = Budget()
    pictures = [load(source, budget) for source in options.images]
    for warning in filter(None, (picture.warning for picture in pictures)):
        say(f"warning: {warning}")
    with Engine(options, say) as engine:
        session = Session(engine, options)

        progress = Progress(engine, options.json)
        session.state.on_picture = progress.picture

        def answer(question: str, shown: list[Picture]) -> Turn:
            try:
                turn = session.ask(question, list(shown), (lambda text: None) if options.json else write, keep_part=True)
            finally:
                progress.stop()
            if options.json:
                print(json.dumps(report(session, turn), ensure_ascii=False), flush=True)
            else:
                write("\n")
            if turn.finish_reason == "context":
                say(f"{full(session)}, the answer ends here")
            progress.answer(turn, session.state.n_cells)
            return turn

        if options.prompt is None:
            return Repl(session, answer, pictures).run()
        return 130 if answer(options.prompt, pictures).finish_reason == "interrupted" else 0


def full(session: Session) -> str:
    """What is full when an answer had to end."""
    cells, n_ctx = session.state.n_cells, session.engine.n_ctx
    if cells >= n_ctx:
        return f"the context is full ({cells} of {n_ctx} tokens)"
    n_hot = stats.cache_use(session.engine, [], cells).n_hot
    return f"there is no memory for more than {n_hot} hot cells (/save keeps a conversation)"


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def report(session: Session, turn: Turn) -> dict[str, object]:
    """The object of --json. kv_* and slots are of all pictures in the conversation, the rest of this answer; kv_ratio is the measured counterpart of --ratio."""
    use = stats.cache_use(session.engine, session.state.images, session.state.n_cells)
    return {
        "answer": turn.answer,
        "finish_reason": turn.finish_reason,
        "prompt_tokens": turn.prompt_tokens,
        "vision_tokens": turn.vision_tokens,
        "tokens_evaluated": turn.tokens_evaluated,
        "tokens_reused": turn.tokens_reused,
        "images_encoded": turn.images_encoded,
        "images_from_disk": turn.images_loaded,
        "generated_tokens": turn.generated_tokens,
        "kv_bytes_f16_equivalent": use.bytes_f16,
        "kv_bytes": use.bytes_now,
        "kv_bytes_allocated": use.bytes_allocated,
        "kv_ratio": round(use.ratio, 4),
        "slots": use.slots,
        "prefill_s": round(turn.prefill_s, 4),
        "compress_s": round(turn.compress_s, 4),
        "decode_tokens_per_s": round(turn.generated_tokens / turn.decode_s, 2) if turn.decode_s > 0 else 0.0,
        "capsule": session.engine.capsule is not None,
        "images": [image.as_json() for image in session.state.images],
    }


if __name__ == "__main__":
    sys.exit(main())
