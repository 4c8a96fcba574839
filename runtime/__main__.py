"""Command line of the runtime: python -m runtime VERB BUNDLE ..., and python -m runtime rpc-server.

Exit codes: 0 done, 2 a UserError (one message on stderr), 130 interrupted, 141 the reader of our output went away.
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()  # first_token_s counts from here, so before the other imports

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Sequence  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import TYPE_CHECKING, Optional, TypeVar  # noqa: E402

from .arguments import Parser, clean_up_on_sigterm, discard_output, port, refuse, settle_streams  # noqa: E402
from .errors import UNWRITABLE, InputError, LibraryError, UserError, printable  # noqa: E402

if TYPE_CHECKING:
    from .bundle import Bundle
    from .manifest import Manifest
    from .sampler import Sampler
    from .session import Session
    from .tokenizer import StopStrings

T = TypeVar("T")
RPC_SERVER = """Offer this machine for tuning: `python -m compiler tune --rpc TRACKER` on a workstation sends kernels,
which are timed here. Whoever may send may run anything as this user."""

SERVER = """Serve /v1/chat/completions, /v1/completions, /v1/models and /health. Sampling options are for requests
that do not say. With QUERN_API_KEY in the environment, requests must carry that key."""


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run one command; gives the exit code."""
    try:
        settle_streams()
        options = parser().parse_args(arguments)
        options.run(options)
        sys.stdout.flush()
    except UserError as error:
        return refuse(str(error))
    except MemoryError:
        return refuse("out of memory. Use a smaller model or context, or close other programs.")
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except OSError as error:
        if error.filename is not None:  # a name that is too long, a folder that may not be looked into
            return refuse(f"{os.fsdecode(error.filename)}: {error.strerror}.")
        if error.errno not in UNWRITABLE:
            raise
        if isinstance(error, BrokenPipeError):
            discard_output()
            return 141
        return refuse(f"the output cannot be written: {error.strerror}. Make room where it goes.")
    return 0


def parser() -> Parser:
    """All verbs and their options."""
    top = Parser(prog="python -m runtime", description="Run a quern bundle.")
    names = "generate | chat | serve | info | logits | bench | rpc-server"
    verbs = top.add_subparsers(dest="verb", required=True, metavar=names)
    generate = _verb(verbs, "generate", "continue a prompt", run_generate)
    generate.add_argument("--prompt", required=True, help="text to continue")
    _running_options(generate)
    _sampling_options(generate, max_new_tokens=128)
    generate.add_argument(
        "--json", action="store_true", help="print one JSON object at the end instead of streaming text"
    )
    generate.add_argument("--ignore-eos", action="store_true", help="go on after an end token (for measurements)")
    chat = _verb(verbs, "chat", "talk; /reset starts over, /exit leaves", run_chat)
    chat.add_argument("--system", help="system message")
    _running_options(chat)
    _sampling_options(chat, max_new_tokens=512)
    serve = _verb(verbs, "serve", "answer OpenAI's requests over HTTP", run_serve, SERVER)
    serve.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="to listen on (default: 127.0.0.1)")
    serve.add_argument("--port", type=port, default=8080, metavar="N", help="to listen on (default: 8080; 0: any)")
    _running_options(serve)
    _sampling_options(serve, max_new_tokens=512)
    info = _verb(verbs, "info", "what is in a bundle, and whether it runs here", run_info)
    info.add_argument("--json", action="store_true", help="print one JSON object")
    info.add_argument("--verify", action="store_true", help="read every file and check its digest, too")
    logits = _verb(verbs, "logits", "logits after every token of a list of ids", run_logits)
    logits.add_argument("--ids", required=True, type=Path, help=".npy file, integers [n]")
    logits.add_argument("--out", required=True, type=Path, help=".npy file to write, float32 [n, vocabulary]")
    logits.add_argument("--last", action="store_true", help="only those after the last: [1, vocabulary]")
    _running_options(logits)
    bench = _verb(verbs, "bench", "how fast a bundle is on this machine", run_bench)
    numbers = {
        "prompt-tokens": "tokens of a prefill (default: 512, or what the context holds)",
        "context": "tokens before the decoded ones (default: 128, or what the context holds)",
        "decode-tokens": "tokens decoded a round (default: 16)", "rounds": "how often each is run (default: 5)",
    }  # fmt: skip
    for name, text in numbers.items():
        bench.add_argument(f"--{name}", type=int, metavar="N", help=text)
    bench.add_argument("--json", action="store_true", help="print one JSON object at the end")
    _running_options(bench)
    _rpc_options(verbs.add_parser("rpc-server", help="offer this machine for tuning", description=RPC_SERVER))
    return top


def _rpc_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--tracker", required=True, type=_address, metavar="HOST:PORT", help="TVM's RPC tracker")
    verb.add_argument("--key", required=True, type=_key, metavar="NAME", help="what it is offered as, e.g. rpi4")
    verb.add_argument(
        "--bind", default="127.0.0.1", metavar="ADDRESS",
        help="where clients may come from (default: this machine alone, through a tunnel)",
    )  # fmt: skip
    verb.add_argument("--port", type=port, default=9090, metavar="N", help="to listen on (default: 9090; 0: any)")
    verb.add_argument("--threads", type=int, help="kernel threads, when a client does not say (default: as generate)")
    verb.add_argument("--limit", type=float, default=1800, metavar="SECONDS", help="of a client's session (1800)")
    verb.add_argument("--tunnel", action="store_true", help=argparse.SUPPRESS)  # for `compiler tune --ssh`
    verb.set_defaults(run=run_rpc_server, verb_parser=verb)


def _address(text: str) -> object:
    from .rpc_tracker import Address

    try:
        return Address.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _key(text: str) -> str:
    if not text or not text.isprintable() or ":" in text or " " in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no name without spaces and colons")
    return text


def _verb(
    verbs: argparse._SubParsersAction[Parser], name: str, text: str, run: object, more: str = ""
) -> Parser:
    verb = verbs.add_parser(name, help=text, description=more or text)
    verb.add_argument("bundle", type=Path, help="bundle directory")
    verb.set_defaults(run=run, verb_parser=verb)
    return verb


def _running_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--threads", type=int, help="kernel threads (default: physical cores we may use)")
    verb.add_argument("--no-cuda-graphs", action="store_true", help="on a GPU: launch kernels one by one in every call")
    verb.add_argument("--no-verify-weights", action="store_true", help="do not check the digest of the weights file")


def _sampling_options(verb: argparse.ArgumentParser, max_new_tokens: int) -> None:
    verb.add_argument("--max-new-tokens", type=int, default=max_new_tokens, metavar="N")
    verb.add_argument("--temperature", type=float, default=0.0, help="0 (default) always takes the most likely token")
    verb.add_argument("--top-k", type=int, default=0, help="0 (default) is off")
    verb.add_argument("--top-p", type=float, default=1.0, help="1 (default) is off")
    verb.add_argument("--min-p", type=float, default=0.0, help="0 (default) is off")
    verb.add_argument("--repetition-penalty", type=float, default=1.0, help="1 (default) is off")
    verb.add_argument("--seed", type=int, help="makes sampling repeatable")
    verb.add_argument(
        "--stop", action="append", default=[], metavar="STR", help="end before this text; may be repeated"
    )


def _open(options: argparse.Namespace, prepare: Callable[[Manifest], T]) -> tuple[Bundle, Session, T]:
    """The checked bundle, a session, and what `prepare` gives, which runs while the weights are being checked.

    So does whatever else takes time to load and is not the bundle's.
    """
    from .bundle import open_bundle

    made = []

    def meanwhile(found: Manifest) -> None:
        from . import session  # noqa: F401

        made.append(prepare(found))
        if found.target.gpu is None:
            from . import tvm_libs

            tvm_libs.load(found.tvm, options.threads)

    bundle = open_bundle(options.bundle, not options.no_verify_weights, meanwhile)
    from .session import Session

    return bundle, Session(bundle, options.threads, graphs=not options.no_cuda_graphs), made[0]


def _for_text(options: argparse.Namespace, found: Manifest) -> tuple[Sampler, StopStrings]:
    """Checks the options that have to do with text, and loads what text needs."""
    from .tokenizer import StopStrings, library

    made = _sampler(options, found.model.vocab_size), StopStrings(options.stop)
    if "tokenizer.json" in found.files:
        library()
    return made


def _sampler(options: argparse.Namespace, vocab_size: int) -> Sampler:
    from .sampler import Sampler, Sampling

    if options.max_new_tokens < 1:
        raise InputError(f"max-new-tokens is {options.max_new_tokens}, but must be at least 1.")
    given = (options.temperature, options.top_k, options.top_p, options.min_p, options.repetition_penalty, options.seed)
    return Sampler(Sampling(*given), vocab_size)


def run_generate(options: argparse.Namespace) -> None:
    """Stream a continuation to stdout and its statistics to stderr, or print both as JSON."""
    bundle, session, (sampler, stops) = _open(options, lambda found: _for_text(options, found))
    from . import device
    from .generate import Generation, Statistics
    from .tokenizer import TextStream, Tokenizer

    tokenizer, tokens = Tokenizer(bundle.tokenizer), bundle.manifest.tokens
    ids = tokenizer.encode(options.prompt) or ([] if tokens.bos is None else [tokens.bos])
    if not ids:
        raise InputError("the prompt is empty and the model has no start token. Give some text with --prompt.")
    load_s = time.perf_counter() - STARTED
    ends = frozenset() if options.ignore_eos else frozenset(tokens.eos)
    reply = Generation(session, sampler, options.max_new_tokens, Statistics(STARTED), ends)
    text = []
    for piece in reply.text(ids, TextStream(tokenizer.decode, ids), stops):
        text.append(piece)
        if not options.json:
            print(piece, end="", flush=True)
    s = reply.statistics
    if options.json:
        print(
            json.dumps(
                {
                    "text": "".join(text),
                    "tokens": reply.tokens,
                    "prompt_tokens": s.prompt_tokens,
                    "prefill_s": s.prefill_s,
                    "decode_s": s.decode_s,
                    "first_token_s": s.first_token_s,
                    "load_s": load_s,
                    "stop_reason": reply.stop_reason,
                    "threads": session.threads,
                    "peak_rss_mib": round(device.peak_rss_mib(), 1),
                }
            )
        )
        return
    print(flush=True)
    print(
        f"{len(reply.tokens)} tokens ({reply.stop_reason}), decode {s.decode_rate:.1f} tokens/s, "
        f"prefill {s.prefill_rate:.1f} tokens/s ({s.prompt_tokens} tokens), "
        f"first token after {s.first_token_s or 0:.2f} s, "
        f"{session.threads} threads, peak memory {device.peak_rss_mib():.0f} MiB",
        file=sys.stderr,
    )


def run_chat(options: argparse.Namespace) -> None:
    """Talk until /exit."""
    bundle, session, (sampler, _) = _open(options, lambda found: _for_text(options, found))
    from .chat import Conversation, converse, terminal_reader
    from .tokenizer import Tokenizer

    conversation = Conversation(
        session, Tokenizer(bundle.tokenizer), sampler, options.max_new_tokens, options.stop, options.system
    )
    converse(conversation, terminal_reader(), lambda piece: print(piece, end="", flush=True), sys.stdin.isatty())


def run_serve(options: argparse.Namespace) -> None:
    """Serve until interrupted."""
    bundle, session, (sampler, _) = _open(options, lambda found: _for_text(options, found))
    from .completions import Defaults
    from .server import Server
    from .tokenizer import Tokenizer

    _check_address(options.host, key := os.environ.get("QUERN_API_KEY") or None)
    defaults = Defaults(sampler.sampling, options.max_new_tokens, tuple(options.stop))
    server = Server(session, Tokenizer(bundle.tokenizer), defaults, (options.host, options.port), key)
    host = f"[{options.host}]" if ":" in options.host else options.host
    print(f"{printable(bundle.manifest.model.name)}: http://{host}:{server.port}/v1", file=sys.stderr, flush=True)
    if not server.local and key is None:
        print("whoever reaches this address may use it: set QUERN_API_KEY to ask for a key", file=sys.stderr)
    clean_up_on_sigterm()
    server.run()


def _check_address(host: str, key: Optional[str]) -> None:
    """Raise InputError for no address, which would be all of them, and for a key that no request could carry."""
    if not host:
        raise InputError("host is empty. Give an address of this machine with --host; 0.0.0.0 is all of them.")
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise InputError("QUERN_API_KEY has a space or a character that is not ASCII. Set another key.")


def run_info(options: argparse.Namespace) -> None:
    """Describe a bundle."""
    from . import info

    if options.json:
        print(json.dumps(info.as_json(options.bundle, options.verify)))
    else:
        print(info.as_text(options.bundle, options.verify), end="")


def run_logits(options: argparse.Namespace) -> None:
    """Write the logits of a list of ids."""
    try:
        from .logits_file import read_ids, write_logits
    except ImportError:
        raise LibraryError(
            "The Python package numpy is not installed, but .npy files need it. "
            "Install it (pip install numpy); generate and chat do without."
        ) from None

    ids = read_ids(options.ids)
    if not options.out.parent.is_dir() or (options.out.exists() and not options.out.is_file()):
        raise InputError(
            f"{options.out}: cannot be written: it is a directory or a device, or is in a directory that does not "
            f"exist. Name a .npy file."
        )
    clean_up_on_sigterm()  # a half-written file goes
    write_logits(_open(options, lambda _: None)[1], ids, options.out, options.last)


def run_bench(options: argparse.Namespace) -> None:
    """Measure, and print a line a round, or one JSON object at the end."""
    _, session, _ = _open(options, lambda _: None)
    load_s = time.perf_counter() - STARTED
    import statistics

    from . import bench

    tell = (lambda _: None) if options.json else lambda line: print(line, flush=True)
    asked = (options.prompt_tokens, options.context, options.decode_tokens, options.rounds)
    found = bench.measure(session, *bench.fitting(session.context, *asked), load_s, tell)
    if options.json:
        print(json.dumps(found))
        return
    middle = {name: statistics.median(found[name]) for name in ("prefill_tok_s", "decode_tok_s")}
    print(
        f"{found['device']}: prefill of {found['prompt_tokens']} tokens {middle['prefill_tok_s']:.1f} tokens/s, decode "
        f"after {found['context']} {middle['decode_tok_s']:.1f} tokens/s (medians), {session.threads} threads, peak "
        f"memory {found['peak_rss_mib']:.0f} MiB, ready after {load_s:.2f} s"
    )


def run_rpc_server(options: argparse.Namespace) -> None:
    """Serve until interrupted."""
    from .rpc_server import Server
    from .tvm_libs import check_threads

    check_threads(options.threads)
    if not options.limit > 0:
        raise InputError(f"limit is {options.limit:g} s, but must be more than 0.")
    clean_up_on_sigterm()
    Server(
        options.tracker, options.key, options.bind, options.port, options.limit, options.threads, options.tunnel
    ).run()


if __name__ == "__main__":
    sys.exit(main())
