"""Train a small GPT on one device or under torchrun: python train.py [--key value ...]

    python train.py                                                  a small run on a CPU, on data/pygpt
    torchrun --nproc_per_node 8 train.py --compile --out_dir out/big  the same batch, spread over 8 GPUs
    python train.py --export assets/pygpt/ckpt.pt --out_dir out/big   the best weights alone, in bf16

Data are nanoGPT's train.bin and val.bin (uint16 token ids), checkpoints are nanoGPT's ckpt.pt. Every random
choice is a function of (seed, step, sample), so a resumed run continues bit for bit, and any number of ranks
sees the same batches. Does not make data (assets/pygpt/corpus.py) or sample (sample.py); knows no sae/.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, get_args, get_origin, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before there is a group: as defaults its functions would keep it for ever
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model import GPT, GPTConfig, read_checkpoint, save_atomic
from tokenizer import BPETokenizer, load_tokenizer


def knob(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig:
    data_dir: str = knob("data/pygpt", "folder with train.bin, val.bin and a tokenizer (else GPT-2's)")
    out_dir: str = knob("out/pygpt", "folder for ckpt.pt (latest), best.pt, config.json and metrics.jsonl")
    resume: bool = knob(False, "go on from out_dir/ckpt.pt, with the settings of out_dir/config.json")
    overwrite: bool = knob(False, "start anew where out_dir/ckpt.pt exists")
    export: str | None = knob(None, "train nothing: write out_dir/best.pt's weights in bf16 to this file")
    # model
    n_layer: int = knob(4, "blocks")
    n_head: int = knob(4, "attention heads per block")
    n_embd: int = knob(128, "width of the residual stream")
    block_size: int = knob(256, "context length in tokens")
    dropout: float = knob(0.0, "dropout probability; 0.1 helps when the data are seen many times")
    bias: bool = knob(False, "biases in linear layers and norms")
    # optimisation
    max_steps: int = knob(600, "optimiser steps")
    batch_size: int = knob(16, "sequences per optimiser step, over all ranks and micro-batches")
    micro_batch_size: int | None = knob(None, "sequences per forward pass on a rank (none: its share)")
    learning_rate: float = knob(1e-3, "peak learning rate")
    min_lr: float = knob(1e-4, "learning rate at the end of the cosine")
    warmup_steps: int = knob(50, "steps of linear warm-up")
    lr_decay_steps: int | None = knob(None, "step at which the cosine reaches min_lr (none: max_steps)")
    weight_decay: float = knob(0.1, "AdamW's decay of matrices and embeddings")
    beta2: float = knob(0.95, "AdamW's second moment decay")
    clip_norm: float | None = knob(1.0, "largest gradient norm (none: no clipping)")
    seed: int = knob(1337, "decides weights, batches and dropout")
    # measuring
    eval_every: int = knob(200, "steps between validations, each followed by a checkpoint")
    eval_tokens: int | None = knob(None, "validate on the first so many tokens (none: the whole val.bin)")
    log_every: int = knob(10, "steps between lines of metrics.jsonl")
    time_limit_s: float | None = knob(None, "stop and save after so many seconds; the schedule stays")
    # machine
    device: str = knob("auto", "auto, cpu, cuda or mps")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = knob("auto", "autocast (auto: 16 bit on CUDA)")
    compile: bool = knob(False, "torch.compile the model")

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "micro_batch_size", "eval_every", "eval_tokens", "log_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} is below 1; raise --{name}")

    def gpt(self, vocab_size: int) -> GPTConfig:
        shape = (self.n_layer, self.n_head, self.n_embd)
        return GPTConfig(self.block_size, vocab_size, *shape, dropout=self.dropout, bias=self.bias)


def lr_at(step: int, config: TrainConfig) -> float:
    """Linear warm-up to learning_rate, then a cosine down to min_lr, which stays."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    end = config.lr_decay_steps or config.max_steps
    part = min(1.0, (step - config.warmup_steps) / max(1, end - config.warmup_steps))
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * part)) * (config.learning_rate - config.min_lr)


# ---- Where we run, and what on -----------------------------------------------------------------------------
class Place(NamedTuple):
    """This process among all of them, and its device."""

    rank: int
    size: int
    device: torch.device

    def sum(self, values: Sequence[float]) -> list[float]:
        """Add up numbers over the ranks, in float64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()


def find_device(name: str) -> torch.device:
    """Return the device that `name` means here; a device that is not there is a ValueError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.startswith("cuda") and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"  # RANK counts over all nodes, LOCAL_RANK in this one
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"device {name!r} is not there ({str(e).splitlines()[0]}); try --device cpu") from e


def find_place(config: TrainConfig) -> Place:
    device = find_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if "RANK" not in os.environ:
        return Place(0, 1, device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Place(dist.get_rank(), dist.get_world_size(), device)


def autocast(config: TrainConfig, device: torch.device) -> tuple[torch.dtype, Callable]:
    name = config.dtype
    if name == "auto":
        cuda = device.type == "cuda"
        name = ("bfloat16" if torch.cuda.is_bf16_supported() else "float16") if cuda else "float32"
    dtype = getattr(torch, name)
    return dtype, nullcontext if dtype == torch.float32 else lambda: torch.autocast(device.type, dtype=dtype)


class Data(NamedTuple):
    """Token ids on disk, and how many bytes of text each of the vocabulary's tokens stands for."""

    train: np.ndarray
    val: np.ndarray
    token_bytes: Tensor  # (V,), 0 for special tokens


def open_data(config: TrainConfig, place: Place) -> Data:
    folder = Path(config.data_dir)
    if config.data_dir == TrainConfig.data_dir and not (folder / "train.bin").exists():
        if place.size > 1:
            raise ValueError(f"{folder} is not made yet; run python assets/pygpt/corpus.py first")
        print(f"making {folder} from Python's standard library")
        importlib.import_module("assets.pygpt.corpus").main(["--out_dir", str(folder)])
    ids, least = {}, config.block_size + 1
    for split in ("train", "val"):
        path = folder / f"{split}.bin"
        if not path.is_file() or path.stat().st_size < 2 * least:
            raise ValueError(f"{path} is missing or below block_size + 1 = {least} tokens; make it first")
        ids[split] = np.memmap(path, dtype=np.uint16, mode="r")
    has_own = (folder / "tokenizer.json").exists() or (folder / "meta.pkl").exists()
    tokenizer = load_tokenizer(folder) if has_own else BPETokenizer.gpt2()
    size, largest = tokenizer.vocab_size, max(int(part[:1_000_000].max()) for part in ids.values())
    if largest >= size:
        raise ValueError(f"{folder} has token {largest}, but its tokenizer only {size}; give the data's own")
    sizes = [0 if i in tokenizer.special_ids else len(tokenizer.token_bytes(i)) for i in range(size)]
    return Data(ids["train"], ids["val"], torch.tensor(sizes, device=place.device))


def batch_at(step: int, data: Data, config: TrainConfig, place: Place, rows: range) -> tuple[Tensor, Tensor]:
    """Return the inputs and targets (B, T) of some rows of a step's global batch: a function of the seed."""
    rng = np.random.Generator(np.random.Philox(key=config.seed, counter=[0, 0, 0, step]))
    starts = rng.integers(0, len(data.train) - config.block_size, config.batch_size)
    starts = starts[rows.start : rows.stop]
    ids = torch.from_numpy(data.train[starts[:, None] + np.arange(config.block_size + 1)].astype(np.int64))
    if place.device.type == "cuda":
        ids = ids.pin_memory().to(place.device, non_blocking=True)
    ids = ids.to(place.device)
    return ids[:, :-1], ids[:, 1:]


class Validation(NamedTuple):
    loss: float  # nats per token
    bits_per_byte: float  # independent of the tokenizer; special tokens cost bits and bring no bytes


@torch.no_grad()
def validate(model: GPT, data: Data, config: TrainConfig, place: Place, batch: int = 16) -> Validation:
    """Measure the model on val.bin (or its first eval_tokens); every token but the first counts once.

    Sums, one reduction, one division: the result depends neither on batch size nor on the number of ranks.
    """
    T = config.block_size
    n_tokens = min(len(data.val), (config.eval_tokens or len(data.val)) + 1)
    ids = np.full(-(-(n_tokens - 1) // T) * T + 1, -1, dtype=np.int64)  # -1 fills up the last window
    ids[:n_tokens] = data.val[:n_tokens]
    x, y = (torch.from_numpy(part.reshape(-1, T)) for part in (ids[:-1].clip(min=0), ids[1:]))
    was_training = model.training
    model.eval()
    dtype = torch.float32 if place.device.type == "mps" else torch.float64
    sums = torch.zeros(2, dtype=dtype, device=place.device)  # nats, bytes
    for i in range(place.rank * batch, len(x), place.size * batch):
        inputs, targets = (part[i : i + batch].to(place.device) for part in (x, y))
        counted = targets[targets >= 0]
        with autocast(config, place.device)[1]():
            sums[0] += model(inputs, targets)[1].to(dtype) * len(counted)
        sums[1] += data.token_bytes[counted].sum()
    model.train(was_training)
    nats, n_bytes = place.sum(sums.tolist())
    return Validation(nats / (n_tokens - 1), nats / math.log(2) / max(1.0, n_bytes))


# ---- The run -----------------------------------------------------------------------------------------------
class Run:
    """What a step changes, and how it is written down."""

    def __init__(self, config: TrainConfig, place: Place, data: Data) -> None:
        self.config, self.place, self.data = config, place, data
        self.out, self.is_main = Path(config.out_dir), place.rank == 0
        weights = torch.Generator().manual_seed(config.seed)
        self.model = GPT(config.gpt(len(data.token_bytes)), generator=weights).to(place.device)
        self.optimizer = self.model.configure_optimizer(
            learning_rate=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, config.beta2)
        )
        dtype, self.autocast = autocast(config, place.device)
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=dtype == torch.float16)
        self.step, self.best, self.started = 0, math.inf, time.monotonic()
        if config.resume:
            self.load()
        elif self.is_main:
            self.out.mkdir(parents=True, exist_ok=True)
            for name in ("metrics.jsonl", "ckpt.pt", "best.pt"):  # of the run that --overwrite gives up
                (self.out / name).unlink(missing_ok=True)
        if self.is_main:
            kept = asdict(replace(config, resume=False, overwrite=False, export=None))
            (self.out / "config.json").write_text(json.dumps(kept, indent=2) + "\n")
        # Hooks, checkpoints and validation use self.model; only the training step goes through the wrappers.
        self.forward: Any = torch.compile(self.model) if config.compile else self.model
        if place.size > 1:
            self.forward = DistributedDataParallel(self.forward)

    def load(self) -> None:
        path = self.out / "ckpt.pt"
        checkpoint, want = read_checkpoint(path), self.model.config.model_args()
        if checkpoint["model_args"] != want:
            raise ValueError(f"{path} has {checkpoint['model_args']}, not {want}; resume with the same")
        if not isinstance(checkpoint.get("optimizer"), dict):
            raise ValueError(f"{path} has no optimiser to resume; give the ckpt.pt of a run")
        self.model.load_state_dict(GPT.from_checkpoint_dict(checkpoint, str(path)).state_dict())
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint.get("scaler"):  # none from float32, bfloat16 or nanoGPT
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.step, self.best = checkpoint["iter_num"], float(checkpoint["best_val_loss"])
        metrics = self.out / "metrics.jsonl"
        if self.is_main and metrics.exists():
            # Steps after the checkpoint will come again, and a crash may have torn the last line.
            lines = [line for line in metrics.read_text().splitlines() if line.endswith("}")]
            metrics.write_text("".join(f"{x}\n" for x in lines if json.loads(x)["step"] <= self.step))

    def save(self, validation: Validation) -> None:
        """Write ckpt.pt, and best.pt (weights alone) when the validation loss is the lowest so far."""
        is_best, self.best = validation.loss < self.best, min(self.best, validation.loss)
        if not self.is_main:
            return
        # nanoGPT's sample.py finds the tokenizer by the name of the dataset.
        config = {**asdict(self.config), "dataset": Path(self.config.data_dir).name}
        state: dict[str, Any] = {"iter_num": self.step, "best_val_loss": self.best, "config": config}
        if is_best:
            save_atomic(self.model.to_checkpoint(**state), self.out / "best.pt")
        state |= {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        save_atomic(self.model.to_checkpoint(**state), self.out / "ckpt.pt")

    def log(self, **metrics: float) -> None:
        if not all(map(math.isfinite, metrics.values())):
            raise ValueError(f"not finite at step {self.step}: {metrics}; lower --learning_rate")
        if self.is_main:
            line = {"step": self.step, **metrics, "time_s": round(time.monotonic() - self.started, 3)}
            with (self.out / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")

    def train_step(self) -> Tensor:
        """One optimiser step on the global batch; returns this rank's mean loss, still on the device."""
        config, place = self.config, self.place
        share = config.batch_size // place.size
        micro = min(config.micro_batch_size or share, share)
        first, loss_sum = place.rank * share, torch.zeros((), device=place.device)
        # Dropout alone uses the global generator: seeded by the step, it has no state that could be lost.
        torch.manual_seed((config.seed * 1_000_003 + self.step) * 1009 + place.rank)
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(self.step, config)
        for start in range(first, first + share, micro):
            x, y = batch_at(self.step, self.data, config, place, range(start, start + micro))
            if place.size > 1:  # gradients travel once per step, with the last micro-batch
                self.forward.require_backward_grad_sync = start + micro == first + share
            with self.autocast():
                loss = self.forward(x, y)[1] * (micro / share)
            self.scaler.scale(loss).backward()
            loss_sum += loss.detach()
        if config.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss_sum


def check(config: TrainConfig, size: int) -> None:
    share = config.batch_size // size
    if config.batch_size % size or share % min(config.micro_batch_size or share, share):
        parts = f"{size} ranks x micro_batch_size={config.micro_batch_size}"
        raise ValueError(f"batch_size={config.batch_size} does not split into {parts}; choose a multiple")
    if not (config.resume or config.overwrite) and (Path(config.out_dir) / "ckpt.pt").exists():
        raise ValueError(f"{config.out_dir}/ckpt.pt exists; add --resume, --overwrite or another --out_dir")


@contextmanager
def ctrl_c() -> Iterator[Callable[[], bool]]:
    """Within the block the first Ctrl-C only makes the function given return True; the second interrupts."""
    pressed: list[int] = []
    mine = threading.current_thread() is threading.main_thread()
    if not mine or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # not ours to handle
        yield lambda: False
        return

    def note(number: int, _frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)
        os.write(2, b"\nstopping after this step; once more: at once\n")  # print may be in the middle of something

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def train(config: TrainConfig, place: Place, pressed: Callable[[], bool] = lambda: False) -> Validation:
    """Train to max_steps (or to the time limit) and return the last validation; if pressed() save and interrupt."""
    check(config, place.size)
    run = Run(config, place, open_data(config, place))
    tokens_per_step = config.batch_size * config.block_size
    limit_s = math.inf if config.time_limit_s is None else config.time_limit_s
    bar = tqdm(total=config.max_steps, initial=run.step, disable=not run.is_main, mininterval=1.0)
    stop, previous, validation = False, None, None
    mark, mark_step = time.monotonic(), run.step
    while run.step < config.max_steps and not stop and not pressed():
        loss = run.train_step()
        bar.update()
        if run.step % config.log_every == 0 and previous is not None:
            # Reading the previous step's loss waits for it alone: this step is queued already.
            is_late = run.is_main and time.monotonic() - run.started > limit_s  # the others follow rank 0
            loss_sum, late = place.sum([previous.item(), is_late])
            mean, stop = loss_sum / place.size, late > 0
            tokens_per_s = round(tokens_per_step * (run.step - mark_step) / (time.monotonic() - mark))
            run.log(loss=mean, lr=lr_at(run.step - 2, config), tokens_per_s=tokens_per_s)
            bar.set_postfix_str(f"loss {mean:.4f}, {tokens_per_s:,} tokens/s")
            mark, mark_step = time.monotonic(), run.step
        previous = loss
        if run.step % config.eval_every == 0 or run.step == config.max_steps or stop:
            nats, bits = validation = validate(run.model, run.data, config, place)
            run.log(val_loss=nats, val_bits_per_byte=bits)  # refuses nan, so none is saved
            if run.is_main:
                bar.write(f"step {run.step}: val loss {nats:.4f}, {bits:.4f} bits per byte")
            run.save(validation)
            mark, mark_step = time.monotonic(), run.step
    if pressed():
        if previous is None or not previous.isfinite():  # as logs refuse nan
            raise KeyboardInterrupt
        run.save(Validation(math.inf, math.inf))
        raise KeyboardInterrupt(f"after step {run.step}, which is saved; --resume --out_dir {run.out} goes on")
    if run.is_main:
        bar.write(f"saved in {run.out}; next: python sample.py --checkpoint {run.out / 'ckpt.pt'}")
    bar.close()
    return validation or validate(run.model, run.data, config, place)


def export(out_dir: str, file: str) -> None:
    """Write the best weights as a small nanoGPT checkpoint: bf16, no optimiser, no paths of this machine."""
    best = read_checkpoint(Path(out_dir) / "best.pt")
    model = GPT.from_checkpoint_dict(best, f"{out_dir}/best.pt")
    kept = {key: best[key] for key in ("iter_num", "best_val_loss")}
    kept["config"] = {k: v for k, v in best["config"].items() if not k.endswith("_dir") and k != "export"}
    save_atomic(model.to_checkpoint(dtype=torch.bfloat16, **kept), file)
    print(f"wrote {file}, {Path(file).stat().st_size:,} bytes, step {best['iter_num']}")


# ---- Flags -------------------------------------------------------------------------------------------------
class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parse_config(argv: Sequence[str]) -> TrainConfig:
    """Defaults < json file (read as if it were flags) < flags. Exits with 2 and a line on what is unknown."""
    parser = OneLineParser(prog="train.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="json file with any of the settings below")
    hints = get_type_hints(TrainConfig)
    for f in fields(TrainConfig):
        flags = dict.fromkeys((f"--{f.name}", f"--{f.name.replace('_', '-')}"))
        kind, help = hints[f.name], f"{f.metadata['help']} (default: {f.default})".replace("%", "%%")
        how: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        if get_origin(kind) is Literal:
            how = {"choices": get_args(kind)}
        elif kind is not bool:
            how = {"type": _reader(kind), "metavar": "X"}
        parser.add_argument(*flags, **how, default=argparse.SUPPRESS, help=help)
    given = vars(parser.parse_known_args(argv)[0])
    file = given["config"]
    if file is None and given.get("resume"):
        file = Path(given.get("out_dir", TrainConfig.out_dir)) / "config.json"
    try:
        args, unknown = parser.parse_known_args([*(_as_flags(file) if file else []), *argv])
        if unknown:
            name = unknown[0].lstrip("-").split("=")[0].replace("-", "_")
            close = [*difflib.get_close_matches(name, hints, n=1), "help"]
            raise ValueError(f"unknown {unknown[0]!r}; did you mean --{close[0]}?")
        return TrainConfig(**{key: value for key, value in vars(args).items() if key != "config"})
    except (OSError, ValueError) as e:
        where = f"{file}: " if isinstance(e, json.JSONDecodeError) else ""
        parser.error(f"{where}{e}")


def _as_flags(file: str | Path) -> list[str]:
    settings = json.loads(Path(file).read_text())
    if not isinstance(settings, dict):
        raise ValueError(f"{file} holds no settings by name; give the config.json of a run")
    return [f"--{k}={v}" if type(v) is not bool else f"--{'' if v else 'no-'}{k}" for k, v in settings.items()]


def _reader(kind: Any) -> Callable[[str], object]:
    options = get_args(kind) or (kind,)  # int | None: (int, NoneType)

    def read(text: str) -> object:
        return None if type(None) in options and text.lower() == "none" else options[0](text)

    read.__name__ = options[0].__name__  # argparse says "invalid int value"
    return read


def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(sys.argv[1:] if argv is None else argv)
    try:
        if config.export:
            export(config.out_dir, config.export)
        elif "RANK" in os.environ:  # several processes might end their steps apart
            train(config, find_place(config))
        else:
            with ctrl_c() as pressed:
                train(config, find_place(config), pressed)
    except (ValueError, OSError) as e:
        print(f"train.py: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as e:
        print(f"\nstopped {e}".rstrip(), file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
