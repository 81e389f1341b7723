"""Print samples from a nanoGPT checkpoint, token by token: python sample.py [--key value ...]

    python sample.py                                           pygpt goes on from "def "
    python sample.py --ask "What does os.path.join do?"        one answer, through the chat template
    python sample.py --checkpoint out/ckpt.pt --start "class "  your own model

The tokenizer is the one beside the checkpoint, else in data/<the dataset it was trained on>, else GPT-2's
if the vocabulary is. Trains nothing; knows nothing of sae/.
"""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from model import GPT, read_checkpoint
from tokenizer import CHAT_TOKENS, BPETokenizer, Tokenizer, load_tokenizer
from train import OneLineParser, find_device


def find_tokenizer(path: Path, checkpoint: dict, vocab_size: int) -> Tokenizer:
    folders = [path if path.is_dir() else path.parent]
    config = checkpoint.get("config")
    if isinstance(config, dict) and config.get("dataset"):
        folders.append(Path("data") / str(config["dataset"]))
    for folder in folders:
        if (folder / "tokenizer.json").is_file() or (folder / "meta.pkl").is_file():
            return load_tokenizer(folder)
    if vocab_size in (50257, 50304):  # GPT-2's, and nanoGPT's padding of it
        return BPETokenizer.gpt2()
    raise ValueError(f"no tokenizer.json or meta.pkl in {', '.join(map(str, folders))}; put it there")


def pieces(tokenizer: Tokenizer, ids: Iterator[int]) -> Iterator[str]:
    """Decode token by token: a character comes out when its last byte is there. Ends at a special token."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for id in ids:
        if id in tokenizer.special_ids:
            break
        yield decoder.decode(tokenizer.token_bytes(id))
    yield decoder.decode(b"", final=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser(prog="sample.py", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    pygpt = Path(__file__).resolve().parent / "assets" / "pygpt"
    parser.add_argument("--checkpoint", type=Path, default=pygpt, help="a ckpt.pt or its folder")
    parser.add_argument("--start", help="the text to go on from (default: 'def ')")
    parser.add_argument("--ask", help="a question to answer, in place of --start")
    parser.add_argument("--num_samples", type=int, help="(default: 3, or 1 with --ask)")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="per sample (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the best token (default: 0.8)")
    parser.add_argument("--top_k", type=int, default=200, help="draw from the best so many (default: 200)")
    parser.add_argument("--seed", type=int, default=1337, help="(default: 1337)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    if args.ask is not None and args.start is not None:
        parser.error("--ask and --start were both given; choose one")
    start = "def " if args.start is None else args.start
    try:
        device, checkpoint = find_device(args.device), read_checkpoint(args.checkpoint)
        model = GPT.from_checkpoint_dict(checkpoint, str(args.checkpoint)).to(device)
        tokenizer = find_tokenizer(args.checkpoint, checkpoint, model.config.vocab_size)
        have, known = tokenizer.vocab_size, model.config.vocab_size
        if have > known:
            raise ValueError(f"the tokenizer has {have} tokens, the model {known}; give the model's own")
        if args.ask is None:
            prompt = tokenizer.encode_document(start)
        elif set(CHAT_TOKENS) <= tokenizer.specials.keys():
            prompt = tokenizer.render_chat([{"role": "user", "content": args.ask}], reply=True)
        else:
            raise ValueError(f"{args.checkpoint} knows no chat tokens; use --start, not --ask")
        idx = torch.tensor([prompt], dtype=torch.long, device=device)
        rng = torch.Generator(device).manual_seed(args.seed)
        n, t, k = args.max_new_tokens, args.temperature, args.top_k
        for _ in range(args.num_samples or (3 if args.ask is None else 1)):
            tokens = model.generate(idx, n, temperature=t, top_k=k, generator=rng)
            answer = pieces(tokenizer, map(int, tokens))
            first = next(answer)  # before anything is printed: with it generate checks what it was asked for
            print((start if args.ask is None else "") + first, end="", flush=True)
            for piece in answer:
                print(piece, end="", flush=True)
            print("\n" + "-" * 20 if args.ask is None else "")
    except (ValueError, OSError) as e:
        print(f"sample.py: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
