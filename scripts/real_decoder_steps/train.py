"""Training: the projector (and a LoRA) learn through the frozen decoder. It can be stopped and taken up again at any step."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .batches import Batch, Rows, Text, all_nouns
from .decoder import Decoder, new_lora
from .features import CHUNK, Features
from .fetch import models
from .pictures import Sources
from .projector import Names, project, start
from .tokenizer import tokenizer

RATES = {"mm0": 2e-4, "mm2": 5e-4, "lora.a": 1e-3, "lora.b": 2e-3}
WARM_UP, EMA, LONGEST = 20, 0.98, 4.5
NAMES = 0.3  # weight of the loss that keeps a patch nearest to its name: without it the projector forgets in 200 steps what it started with


@dataclass(frozen=True)
class Plan:
    """steps: stop there (0: never); decay: over the last so many steps before `steps` the rate falls to a tenth; rank: of the LoRA (0: none)."""

    work: Path
    name: str = "run"
    steps: int = 0
    decay: int = 0
    rank: int = 16
    rows: int = 8
    pictures: int = 8192
    first: int = 1536


class Training:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        sources = Sources(plan.work / "x")
        model, onnx_file = models(plan.work)
        self.decoder = Decoder(model)
        self.text = Text(tokenizer(model))
        nouns = all_nouns(sources.stamps)
        self.features = Features(plan.work / "features" / "train", sources, onnx_file)
        held = Features(plan.work / "features" / "held", sources, onnx_file, held=True)
        while len(held) < CHUNK:
            held.add_chunk()
        while len(self.features) < plan.first:
            self.features.add_chunk()
        self.names = Names(self.decoder, self.text.tokenize, nouns)
        self.rows, self.held = Rows(self.features, self.text, nouns, self.names), Rows(held, self.text, nouns)
        self.rng = np.random.default_rng(0)
        self.step = 0
        self.file = plan.work / f"{plan.name}.pt"
        if self.file.exists():
            self._resume()
        else:
            self.p = start(self.features, self.names, self.say)
            if plan.rank:
                self.p |= {f"lora.{k}": v for k, v in new_lora(plan.rank).items()}
            self.ema = {k: v.clone() for k, v in self.p.items()}
            self._optimizer()

    def say(self, line: str) -> None:
        print(f"{time.strftime('%H:%M:%S', time.gmtime())} {line}", flush=True)

    def _optimizer(self) -> None:
        for v in self.p.values():
            v.requires_grad_()
        groups = {name: [] for name in RATES}
        for k, v in self.p.items():
            groups[f"lora.{k[-1]}" if k.startswith("lora.") else k[:3]].append(v)
        self.optimizer = torch.optim.AdamW([{"params": v, "lr": RATES[k], "rate": RATES[k]} for k, v in groups.items() if v], betas=(0.9, 0.95), weight_decay=0.0)

    def save(self) -> None:
        new = self.file.with_suffix(".new")
        torch.save({"step": self.step, "p": {k: v.detach() for k, v in self.p.items()}, "ema": self.ema,
                    "optimizer": self.optimizer.state_dict(), "rng": self.rng.bit_generator.state}, new)
        os.replace(new, self.file)

    def _resume(self) -> None:
        state = torch.load(self.file, weights_only=False)
        self.step, self.p, self.ema = state["step"], state["p"], state["ema"]
        self.rng.bit_generator.state = state["rng"]
        self._optimizer()
        self.optimizer.load_state_dict(state["optimizer"])
        self.say(f"taken up at step {self.step}")

    def forward(self, batch: Batch, p: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """-> logits of the places with a label, embeddings of the pictures' tokens."""
        lora = {k[5:]: v for k, v in p.items() if k.startswith("lora.")} or None
        image = project(batch.images, p)
        x = self.decoder.embed(batch.ids.clamp(min=0)).masked_scatter((batch.ids == -1)[..., None], image)
        before = self.decoder.prefix(self.text.before, lora)
        hidden = self.decoder.hidden(x, batch.pos, batch.bias, before, lora, real=batch.real)
        return self.decoder.logits(hidden[batch.labels >= 0]), image

    def one_step(self) -> tuple[float, float]:
        """-> loss, share of answer tokens right."""
        plan = self.plan
        rate = min(1.0, (self.step + 1) / WARM_UP)
        if plan.decay and plan.steps:
            rate *= max(0.1, min(1.0, (plan.steps - self.step) / plan.decay))
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * rate
        batch = self.rows.batch(self.rng, plan.rows)
        logits, image = self.forward(batch, self.p)
        labels = batch.labels[batch.labels >= 0]
        loss = F.cross_entropy(logits, labels)
        (loss + NAMES * self.names.loss(image, batch.names) + 0.02 * F.relu(image.norm(dim=-1) - LONGEST).pow(2).mean()).backward()
        torch.nn.utils.clip_grad_norm_(list(self.p.values()), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        keep = min(EMA, self.step / (self.step + 10))
        with torch.no_grad():
            for k, v in self.p.items():
                self.ema[k].lerp_(v.detach(), 1 - keep)
        return loss.item(), (logits.argmax(-1) == labels).float().mean().item()

    @torch.no_grad()
    def check(self, size: int = 64, n: int = CHUNK) -> str:
        """Share of the answers to held-out questions of which every token comes first, given those before it; by task."""
        rng = np.random.default_rng(1)
        right: dict[str, list[bool]] = {}
        for i in range(0, n, 8):
            rows = [([k], self.held.ask([k], rng)) for k in range(i, i + 8)]
            batch = self.held.build(rng, rows, [size] * 8)
            hit = torch.zeros_like(batch.labels, dtype=torch.bool)
            logits, _ = self.forward(batch, self.ema)
            hit[batch.labels >= 0] = logits.argmax(-1) == batch.labels[batch.labels >= 0]
            for row, asked in enumerate(batch.asked):
                for q, start, end in asked:
                    right.setdefault(q.task, []).append(bool(hit[row, start:end].all()))
        every = [r for rs in right.values() for r in rs]
        return f"held-out with {size} tokens: {np.mean(every):.3f} of {len(every)}; " + ", ".join(f"{k} {np.mean(v):.2f}" for k, v in sorted(right.items()))

    def run(self) -> None:
        plan = self.plan
        self.say(f"step {self.step}, {len(self.features)} pictures, {sum(v.numel() for v in self.p.values()) / 1e6:.2f} M values")
        stop = []
        signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
        signal.signal(signal.SIGINT, lambda *_: stop.append(True))
        recent, cpu = [], time.process_time()
        while not stop and not (plan.steps and self.step >= plan.steps):
            recent.append(self.one_step())
            if self.step % 50 == 0:
                loss, right = np.mean(recent, 0)
                self.say(f"step {self.step} loss {loss:.3f} right {right:.3f} pictures {len(self.features)} cpu {time.process_time() - cpu:.0f} s")
                recent, cpu = [], time.process_time()
                self.save()
            if self.step % 16 == 0 and len(self.features) < plan.pictures:
                self.features.add_chunk()
            if self.step % 200 == 0:
                self.say(self.check())
        self.save()
        self.say(f"stopped at step {self.step}")
