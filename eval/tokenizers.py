"""PROGRAM: several tokenizers on one set of images, and which of their scores predict what a GPT makes of them.

    python -m eval.tokenizers CONFIG tokenizers.vq=RUN tokenizers.fsq=RUN images=SHARDS out=DIR

Each tokenizer is scored by eval.reconstruct and timed. With a ``probe`` a small GPT is trained on the tokens that
tokenizer_training.extract makes with it, eval.sample draws from that, and eval.evaluate scores the pictures against the
held-out images; the rank correlations say which score orders the tokenizers as these FIDs do. The steps are programs of
their own, a pipeline in OUT/steps: the same command after any end does what is missing.
"""

import json
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from llamagen_dist.config import PipelineConfig, StageSection, TokenizersConfig, load
from llamagen_dist.config.yaml_text import text_of
from llamagen_dist.data.images import load_images, to_floats
from llamagen_dist.data.shards import Shards, open_shards
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation import inception_weights
from llamagen_dist.evaluation.perceptual import LPIPS
from llamagen_dist.evaluation.tokenizer_scores import BETTER, agreement, noise_share, probe, rates
from llamagen_dist.files import OutputFolder, own_folder, read_json, read_jsonl, write_bytes, write_text
from llamagen_dist.launch import here
from llamagen_dist.launch.graph import Graph, absolute
from llamagen_dist.launch.stages import fill
from llamagen_dist.parallel.topology import Topology, full_fp32, start
from llamagen_dist.program import run as run_program
from llamagen_dist.report import files, plots
from llamagen_dist.report import tokenizers as shown
from llamagen_dist.sampling.chunks import write_npz
from llamagen_dist.sampling.load import Tokenizer, load_tokenizer
from llamagen_dist.tracking.provenance import versions

_LEFT_OUT: dict[str, Any] = {
    **dict.fromkeys(("out", "threads", "ranks", "tokenizers", "images"), True),
    "inception": {"cache"},
}
"""Of the config: what decides no number, and paths, whose content has a hash instead."""
_REPEATS = 5  # of the timed passes, whose median counts


def main(argv: list[str]) -> None:
    if not argv:
        raise UserError("usage: python -m eval.tokenizers CONFIG tokenizers.NAME=PATH … images=SHARDS out=DIR")
    config = cast(TokenizersConfig, absolute(load(argv[0], argv[1:], kind="tokenizers")))
    topology = start(threads=config.threads)
    if topology.world > 1:
        raise UserError(f"ranks: start eval.tokenizers once, not on {topology.world} ranks; its steps run on ranks=N")
    full_fp32()
    Bench(config, topology).run()


@dataclass(frozen=True)
class Facts:
    """Of one tokenizer. tokens: per image."""

    sha256: str
    quantizer: str
    codes: int
    tokens: int
    params: int


class Bench:
    """One comparison in its folder. Raises UserError, before anything runs, for whatever no step could do."""

    def __init__(self, config: TokenizersConfig, topology: Topology) -> None:
        self.config, self.topology = config, topology
        self.held_out = _shards(config.images / "validation")
        size = config.image_size or self.held_out.manifest.image_size
        if size is None:
            raise UserError(f"image_size: the images of {self.held_out.location} differ in size; set image_size=256")
        self.size = size
        self.count = min(config.limit or len(self.held_out), len(self.held_out))
        self.facts = {name: self._facts(name) for name in config.tokenizers}
        identity = config.model_dump(mode="json", exclude=_LEFT_OUT)
        identity |= {"tokenizers": {name: facts.sha256 for name, facts in self.facts.items()}}
        identity |= {"image_size": self.size, "n": self.count, "validation": self.held_out.manifest.fingerprint()}
        if config.lpips is not None:
            trunk = LPIPS(config.lpips.trunk, config.lpips.weights, "lpips.weights", "leave lpips out").trunk
            identity["lpips_trunk"] = trunk.sha256
        if config.probe is not None:
            identity["train"] = self._check_probe().manifest.fingerprint()
        self.output = OutputFolder(config.out, identity, what="a comparison of tokenizers", key="out")
        self.steps = config.out / "steps"
        self.results = [config.out / f"results.{form}" for form in ("json", "md", "png")]

    def _open(self, name: str) -> Tokenizer:
        in_a_run = "a run directory whose config has model"
        return load_tokenizer(self.config.tokenizers[name], key=f"tokenizers.{name}", sizes=in_a_run)

    def _facts(self, name: str) -> Facts:
        tokenizer = self._open(name)
        model, config, size = tokenizer.model, tokenizer.model.config, self.size
        if size % config.downsampling:
            raise UserError(
                f"tokenizers.{name}: {tokenizer.path} makes tokens of {config.downsampling} x {config.downsampling} "
                f"pixels, into which {size} pixels cannot be cut; leave it out, or set another image_size"
            )
        if (why := config.uncoded(size)) is not None:
            raise UserError(f"tokenizers.{name}: image_size: {size} {why} {tokenizer.path}; leave it out")
        perturb, codes = self.config.perturb, config.codebook_size
        if perturb is not None and perturb.neighbours >= codes:
            raise UserError(f"perturb.neighbours: tokenizers.{name} has {codes} codes; lower it, or set perturb=null")
        tokens = model.encode(torch.zeros(1, 3, size, size)).numel()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return Facts(tokenizer.sha256, config.quantizer, codes, tokens, parameters)

    def _check_probe(self) -> Shards:
        """The training images. Raises UserError for what would stop the probe later."""
        config, train = self.config, _shards(self.config.images / "train")
        assert config.probe is not None
        classes = train.manifest.classes
        if classes is None or self.held_out.manifest.classes != classes:
            raise UserError(f"images: the probe draws classes, and train and validation of {config.images} share none")
        stored = train.manifest.image_size, self.held_out.manifest.image_size
        if any(size not in (None, self.size) for size in stored):
            raise UserError(
                f"image_size: the probe learns whole images, and those of {config.images} have {stored[0]} pixels, not "
                f"{self.size}; leave image_size out, pack the images again, or set probe=null"
            )
        if self.count < max(2, len(classes)):
            raise UserError(f"limit: {self.count} pictures do not show each of the {len(classes)} classes once")
        for name, facts in self.facts.items():
            if facts.codes > 1 << 16:
                raise UserError(f"tokenizers.{name}: {facts.codes} codes do not fit into token shards (65,536)")
            try:
                config.probe.model.gpt(vocab_size=facts.codes, image_tokens=facts.tokens, num_classes=len(classes))
            except ValueError as error:
                raise UserError(f"probe.model: with tokenizers.{name}: {error}") from None
        missing = inception_weights.open_extractor(config.inception)
        if isinstance(missing, str):
            raise UserError(f"probe: no FID without the extractor: {missing}; or set probe=null")
        return train

    def run(self) -> None:
        """Do what is missing, then write the results. Raises UserError and SystemExit as ``here.run`` does."""
        if self.output.finished(self.results) is not None:
            self.topology.log0(f"{self.config.out}: complete already")
            self.topology.log0(shown.terminal(read_json(self.results[0])))
            return
        begun = [path for path in (self.steps / "config.yaml",) if path.exists()]
        self.output.begin([*self.results, *begun], refuse_empty=bool(begun))
        if self.config.probe is not None:
            self._write_originals()
        graph = self.graph()
        if not begun:
            graph.keep()  # else the folder, which is not empty, would be taken for something else's
        here.run(graph)
        self._finish({name: self._row(name) for name in self.facts})

    def _write_originals(self) -> None:
        """What the probes are compared with: the held-out images, cut as the tokenizers see them."""
        if not (file := own_folder(self.steps) / "originals.npz").exists():
            blocks = (range(first, min(first + 256, self.count)) for first in range(0, self.count, 256))
            labels = self.held_out.labels(range(self.count))
            pixels = (load_images(self.held_out, block, self.size) for block in blocks)
            write_npz(file, labels, self.count, pixels)

    # --- the steps ---

    def graph(self) -> Graph:
        """All steps, tokenizer by tokenizer, and in the end the scores of all pictures at once."""
        stages = [stage for name in self.facts for stage in self._stages(name)]
        if self.config.probe is not None:
            sets = {self._set(name, seed): self._pictures(name, seed) for name in self.facts for seed in self._seeds}
            reference = str(self.steps / "originals.npz")
            scored: dict[str, Any] = {
                "kind": "evaluate",
                "protocol": "tokenizer-probe",
                "sets": {one: {"images": str(file), "reference": reference} for one, file in sets.items()},
                "metrics": ["fid", "kid"],
                "scores": "samples",
                "limit": None,
                "fewer": "common",
                "out": str(self.steps / "probe.json"),
            }
            scored |= {"batch": self.config.batch, "inception": self._dumped("inception")}
            why = "Score the pictures of all probes against the held-out images."
            stages.append(self._stage("scores", why, "eval.evaluate", scored, self.steps / "probe.json"))
        pipeline = PipelineConfig(kind="pipeline", title="Tokenizers compared", stages=tuple(stages))
        return fill(pipeline, self.steps / "pipeline.yaml", self.steps)

    def _stages(self, name: str) -> Iterator[StageSection]:
        config, folder, tokenizer = self.config, self.steps / name, str(self.config.tokenizers[name])
        yield self._stage(
            f"{name}-reconstruct",
            f"Send held-out images through {name} and back.",
            "eval.reconstruct",
            {
                "kind": "reconstruct",
                "tokenizer": tokenizer,
                "images": str(self.held_out.location),
                "out": str(folder / "reconstruction"),
                "image_size": self.size,
                "limit": self.count,
                "rfid": True,
                **{key: self._dumped(key) for key in ("inception", "lpips", "perturb")},
                "batch": config.batch,
            },
            folder / "reconstruction" / "record.json",
        )
        if config.probe is None:
            return
        yield self._stage(
            f"{name}-tokens",
            "Turn the training images into its tokens.",
            "tokenizer_training.extract",
            {
                "kind": "extract",
                "tokenizer": tokenizer,
                "images": str(config.images),
                "out": str(folder / "tokens"),
                "image_size": self.size,
                "crops": config.probe.crops,
                "batch": config.batch,
            },
            folder / "tokens" / "train" / "manifest.json",
        )
        dumped = self._dumped("probe")
        for seed in self._seeds:
            run = folder / f"gpt-{seed}"
            yield self._stage(
                f"{name}-gpt-{seed}",
                f"Train a small GPT on them, seed {seed}.",
                "llamagen_dist.train_gpt",
                {
                    "kind": "gpt",
                    "run_dir": str(run),
                    "data": {"train": str(folder / "tokens/train"), "validation": str(folder / "tokens/validation")},
                    "model": dumped["model"],
                    "train": dumped["train"] | {"seed": seed},
                    "optim": dumped["optim"],
                    "parallel": {"threads": config.threads},
                    "validation": {"images": self.count},
                },
                run / "summary.json",
            )
            yield self._stage(
                f"{name}-pictures-{seed}",
                "Draw with it.",
                "eval.sample",
                {
                    "kind": "sample",
                    "checkpoint": str(run),
                    "tokenizer": tokenizer,
                    "out": str(self._pictures(name, seed).parent),
                    "images": self.count,
                    "seed": seed,
                    "batch": config.batch,
                    **{key: dumped[key] for key in ("cfg_scale", "temperature", "top_k", "top_p")},
                },
                self._pictures(name, seed),
            )

    def _stage(self, name: str, why: str, module: str, keys: dict[str, Any], produces: Path) -> StageSection:
        file = own_folder(self.steps / "configs") / f"{name}.yaml"
        threads = {} if keys["kind"] == "gpt" else {"threads": self.config.threads}
        write_text(file, text_of(keys | threads))
        ranks = self.config.ranks
        return StageSection(name=name, why=why, module=module, config=file, ranks=ranks, produces=(str(produces),))

    def _dumped(self, key: str) -> Any:
        return self.config.model_dump(mode="json", include={key})[key]

    @property
    def _seeds(self) -> tuple[int, ...]:
        return () if self.config.probe is None else self.config.probe.seeds

    @staticmethod
    def _set(name: str, seed: int) -> str:
        return f"{name}, seed {seed}"

    def _pictures(self, name: str, seed: int) -> Path:
        return self.steps / name / f"pictures-{seed}" / "model.npz"

    # --- the results ---

    def _row(self, name: str) -> dict[str, Any]:
        """Everything that results.json says of one tokenizer."""
        facts, folder = self.facts[name], self.steps / name
        record = read_json(folder / "reconstruction" / "record.json")
        row: dict[str, Any] = {
            "quantizer": facts.quantizer,
            "codes": facts.codes,
            "tokens": facts.tokens,
            "params": facts.params,
            **{key: record[key] for key in ("psnr_pooled", *BETTER) if key in record},
            **rates(facts.codes, record["codebook_perplexity"], facts.tokens, self.size),
        }
        if self._seeds:
            scored = read_json(self.steps / "probe.json")["sets"]
            seeds = {}
            for seed in self._seeds:
                lines = read_jsonl(folder / f"gpt-{seed}" / "metrics.jsonl")
                last = next(line for line in reversed(lines) if "val_loss" in line)
                kept = {key: scored[self._set(name, seed)][key] for key in ("fid", "kid_mean")}
                seeds[seed] = {**kept, "val_loss": last["val_loss"]}
            row["probe"] = probe(seeds)
        return row | {"speed": self._speed(name)}

    def _speed(self, name: str) -> dict[str, float]:
        """Measured once, and kept until the results are written."""
        known = self.output.kept(f"speed-{name}")
        if known is None:
            known = self._timed(self._open(name))
            self.output.keep(f"speed-{name}", known)
        return known

    def _timed(self, tokenizer: Tokenizer) -> dict[str, float]:
        """images/s, and CPU-seconds of this process per image, of encoding and decoding one batch: medians."""
        model, device = tokenizer.model.to(self.topology.device), self.topology.device
        some = range(min(self.config.batch, self.count))
        images = to_floats(load_images(self.held_out, some, self.size)).to(device)
        codes = model.encode(images)
        measured: dict[str, list[tuple[float, float]]] = {"encode": [], "decode": []}
        for repeat in range(_REPEATS + 1):
            for what, passed in (("encode", lambda: model.encode(images)), ("decode", lambda: model.decode(codes))):
                wall, cpu = time.perf_counter(), time.process_time()
                _finished(passed())
                if repeat:  # the first is a warm-up
                    measured[what].append((time.perf_counter() - wall, time.process_time() - cpu))
        found = {}
        for what, times in measured.items():
            walls, cpus = ([one[part] for one in times] for part in (0, 1))
            found[f"{what}_images_per_s"] = len(some) / statistics.median(walls)
            found[f"{what}_cpu_s_per_image"] = statistics.median(cpus) / len(some)
        return found

    def _finish(self, rows: dict[str, dict[str, Any]]) -> None:
        config = self.config
        content: dict[str, Any] = {
            "kind": "tokenizers",
            "n": self.count,
            "image_size": self.size,
            "tokenizers": rows,
            "correlations": agreement(rows),
            "noise_share": noise_share(rows),
            "probe": None if config.probe is None else self._dumped("probe"),
            "absent": read_json(self.steps / next(iter(rows)) / "reconstruction" / "record.json").get("absent", {}),
        }
        write_text(self.results[0], json.dumps(content, indent=1, allow_nan=False) + "\n")
        text = "\n\n".join(files.markdown(shown.section(content), lambda _: "![results.png](results.png)"))
        write_text(self.results[1], text + "\n")
        write_bytes(self.results[2], plots.draw(shown.figure(content), "png"))
        self.output.finish(
            {
                "paths": {name: str(path) for name, path in config.tokenizers.items()},
                "images": str(config.images),
                "device": str(self.topology.device),
                "cpus": os.cpu_count(),
                "threads": torch.get_num_threads(),
                "versions": versions("torch", "numpy", "scipy"),
            }
        )
        self.topology.log0(shown.terminal(content))


def _shards(folder: Path) -> Shards:
    return open_shards(folder, "images")


def _finished(result: Tensor) -> None:
    """Wait until the device has computed it."""
    if result.device.type == "cuda":
        torch.cuda.synchronize(result.device)


if __name__ == "__main__":
    run_program(main)
