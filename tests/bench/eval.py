"""PROGRAM: what scoring costs beside the usual evaluators.

    OMP_NUM_THREADS=1 python -m tests.bench.eval [--images 64] [--dimensions 2048] [--points 6000] [--folder 1000]
        [--moments 50000] [--repeats 3]

Ratios of CPU seconds, interleaved: Inception features against the same network unfolded and contiguous (and inside
torch-fidelity, where the oracle extra is installed), the Fréchet distance against scipy's square root and the
eigenvalues of the product, precision and recall against torch-fidelity, and from the command to the FID of two folders
of pictures against torch-fidelity, pytorch-fid and this evaluator on two ranks. 0: not this part. Nothing is asserted.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from llamagen_dist.config import InceptionSection
from llamagen_dist.evaluation import frechet, inception, inception_weights, manifold, resizing
from tests.photo_crops import crops, degrade

try:
    import torch_fidelity
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.metric_prc import prc_features_to_metric
except ImportError:
    torch_fidelity = None


def compare(what: str, repeats: int, ours: Callable[[], Any], others: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """Print how many times as long the others take, by the medians; the last result of each."""
    calls = {"ours": ours, **others}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    results = {}
    for _ in range(repeats):
        for name, call in calls.items():
            began = time.process_time()
            results[name] = call()
            seconds[name].append(time.process_time() - began)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = "  ".join(f"{name} {median[name]:.2f} s = {median[name] / median['ours']:.2f} x" for name in others)
    print(f"{what}: ours {median['ours']:.2f} s  {ratios}", flush=True)
    return results


class Unfolded(torch.nn.Module):
    """A convolution with its batch norm beside it, as other ports have them."""

    def __init__(self, conv: inception.Conv, weights: dict[str, Tensor], name: str) -> None:
        super().__init__()
        outputs, inputs, *kernel = conv.weight.shape
        self.conv = torch.nn.Conv2d(inputs, outputs, kernel, conv.stride, conv.padding, bias=False)
        self.bn = torch.nn.BatchNorm2d(outputs, eps=inception.BN_EPS)
        own = {key.removeprefix(f"{name}."): tensor for key, tensor in weights.items() if key.startswith(f"{name}.")}
        self.load_state_dict(own, strict=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


def plain_network(weights: dict[str, Tensor]) -> inception.Inception:
    """Batch norms apart, contiguous memory."""
    network = inception.assemble(weights)
    for name, conv in list(network.named_modules()):
        if isinstance(conv, inception.Conv):
            parent = network.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], Unfolded(conv, weights, name))
    return network.to(memory_format=torch.contiguous_format).eval()


def as_others_want(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """With a last layer, which is not there, and counters, which are not used."""
    counters = {k.replace("bias", "num_batches_tracked"): torch.tensor(0) for k in weights if "bn.bias" in k}
    return {**weights, **counters, "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}


def extraction(images: int, repeats: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        extractor = inception_weights.open_extractor(InceptionSection(cache=Path(folder)))
        assert not isinstance(extractor, str), extractor
        weights = load_file(next(Path(folder).iterdir()))
        plain = plain_network(weights)
        pixels = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (images, 64, 64, 3), np.uint8))
        others: dict[str, Callable[[], Tensor]] = {}

        @torch.inference_mode()
        def run_plain() -> Tensor:
            parts = [(resizing.resize_tf1(part) - 128) / 128 for part in pixels.split(8)]
            return torch.cat([plain.features(part.contiguous()).pool for part in parts])

        others["plain fp32"] = run_plain
        if torch_fidelity is not None:
            torch.save(as_others_want(weights), Path(folder) / "w.pth")
            theirs = FeatureExtractorInceptionV3("w", ["2048"], feature_extractor_weights_path=Path(folder) / "w.pth")
            channels_first = pixels.permute(0, 3, 1, 2).contiguous()
            others["torch-fidelity"] = lambda: torch.cat([theirs(part)[0] for part in channels_first.split(8)])
        ours = lambda: torch.cat([extractor.network(part).pool for part in pixels.split(8)])  # noqa: E731
        results = compare(f"features of {images} images, equal numerics", repeats, ours, others)
        for name in others:
            error = float((results["ours"] - results[name]).norm() / results[name].norm())
            print(f"  rel-L2 against {name}: {error:.1e}")


def distances(dimensions: int) -> None:
    """Full rank, then fewer images than dimensions. Truth: the nuclear norm of the product of two QR factors."""
    r = np.random.RandomState(0)
    mixing = r.randn(dimensions, dimensions) / dimensions**0.5
    for count in (3 * dimensions // 2, dimensions // 4):
        sets = [torch.from_numpy(np.maximum(r.randn(count, dimensions) @ mixing + 0.1 * shift, 0)) for shift in (0, 1)]
        a, b = (frechet.gaussian_of(x) for x in sets)
        covariances = [np.cov(x.numpy(), rowvar=False) for x in sets]
        rest = float((a.mean - b.mean).square().sum()) + sum(float(np.trace(s)) for s in covariances)
        factors = [torch.linalg.qr((x - x.mean(0)) / (count - 1) ** 0.5).R for x in sets]
        truth = rest - 2 * float(torch.linalg.svdvals(factors[0] @ factors[1].T).sum())

        def by_root(covariances: list[np.ndarray] = covariances, rest: float = rest) -> float:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a singular product is the point here
                return rest - 2 * float(np.trace(np.real(scipy.linalg.sqrtm(covariances[0] @ covariances[1]))))

        def by_eigenvalues(covariances: list[np.ndarray] = covariances, rest: float = rest) -> float:
            values = np.linalg.eigvals(covariances[0] @ covariances[1])
            return rest - 2 * float(np.sqrt(values.astype(complex)).real.sum())

        results = compare(
            f"Fréchet distance, {count} images, d = {dimensions}",
            1,
            lambda a=a, b=b: frechet.frechet_distance(a, b),
            {"scipy sqrtm": by_root, "eigvals": by_eigenvalues},
        )
        errors = "  ".join(f"{name} {abs(value - truth):.1e}" for name, value in results.items())
        print(f"  {truth:.6f}; off by: {errors}")


def precision_and_recall(points: int, repeats: int) -> None:
    generator = torch.Generator().manual_seed(0)
    real, made = (torch.randn(points, inception.POOL_FEATURES, generator=generator) for _ in range(2))
    made *= 0.98
    others = {}
    if torch_fidelity is not None:
        others["torch-fidelity"] = lambda: tuple(prc_features_to_metric(made, real, verbose=False).values())
    # compare() prints what there is: without the oracle extra our own seconds
    for name in ("torch-fidelity", "exact"):
        convention = manifold.CONVENTIONS[name]
        ours = lambda convention=convention: manifold.manifold_scores(made, real, convention)  # noqa: E731
        results = compare(f"precision and recall of {points} x {points}, {convention.dtype}", repeats, ours, others)
        print("  " + "  ".join(f"{key} {value[0]:.6f} {value[1]:.6f}" for key, value in results.items()))
    print(
        "  why two precisions: sums of 2048 fp32 products are rounded by about 1e-6 of a squared distance, so an image "
        "on a border falls either way, by block and library; fp64, the default, counts alike on any number of ranks, "
        "for twice the arithmetic. ADM and torch-fidelity count in fp32 (manifold=adm, torch-fidelity)"
    )
    block = manifold.BLOCK * points * 4 / 1e6
    print(
        f"  distances in memory: {block:.0f} MB in blocks, {points * points * 4 / 1e6:.0f} MB as a whole matrix (fp32)"
    )


FIDELITY = """
import sys, torch, torch_fidelity
torch.set_num_threads(1)
found = torch_fidelity.calculate_metrics(input1=sys.argv[1], input2=sys.argv[2], fid=True, cuda=False, cache=False,
    batch_size=20, verbose=False, feature_extractor_weights_path=sys.argv[3])
print(found["frechet_inception_distance"])
"""
PYTORCH_FID = """
import sys, torch, pytorch_fid.inception, pytorch_fid.fid_score as fid
torch.set_num_threads(1)
weights = torch.load(sys.argv[3])
pytorch_fid.inception.load_state_dict_from_url = lambda *a, **k: weights
print(fid.calculate_fid_given_paths(sys.argv[1:3], 20, "cpu", 2048, num_workers=0))
"""


def cpu_seconds(words: list[str]) -> tuple[float, str]:
    """Of a process and all that it starts, start-up included; and what it prints."""
    used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])  # noqa: E731
    before = used()
    ran = subprocess.run(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return used() - before, ran.stdout


def folders(images: int) -> None:
    """From the command to the FID of two folders of 64 x 64 PNG pictures: crops of photographs, and others degraded."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for side, pixels in (("real", crops(images, 0)), ("made", degrade(crops(images, 1)))):
            (root / side).mkdir()
            for number, picture in enumerate(pixels):
                Image.fromarray(picture).save(root / side / f"{number:05d}.png")
        assert not isinstance(inception_weights.open_extractor(InceptionSection(cache=root / "cache")), str)
        torch.save(as_others_want(load_file(next((root / "cache").iterdir()))), root / "w.pth")
        sides, python = [str(root / "made"), str(root / "real")], sys.executable
        asked = ["configs/eval/plain.yaml", f"generated={sides[0]}", f"reference={sides[1]}", "metrics=[fid]"]
        asked += ["threads=1", f"inception.cache={root / 'cache'}", f"out={root / 'o.json'}"]
        one, every = ["-m", "eval.evaluate", *asked], ["limit=null", "batch=20"]
        two = ["-m", "torch.distributed.run", "--nproc-per-node=2", *one]
        others = {
            "ours": [*one, *every],
            "ours, 2 ranks": [*two, *every],
            "ours, pytorch-fid's resize": [*one, *every, "inception.resize=pytorch-fid"],
        }
        if torch_fidelity is not None:
            others["torch-fidelity"] = ["-c", FIDELITY, *sides, str(root / "w.pth")]
            others["pytorch-fid"] = ["-c", PYTORCH_FID, *sides, str(root / "w.pth")]
        print(f"FID of two folders of {images} pictures, from the command on, CPU seconds with start-up:", flush=True)
        spent: dict[str, float] = {}
        for what, words in others.items():
            spent[what], said = cpu_seconds([python, *words])
            if words[-1].endswith(".pth"):
                fid = float(said.split()[-1])
            else:
                fid = json.loads((root / "o.json").read_text())["sets"]["generated"]["fid"]
            print(f"  {what}: {spent[what]:.1f} s = {spent[what] / spent['ours']:.2f} x  FID {fid:.5f}", flush=True)
        start_up = [cpu_seconds([python, *words, "limit=2", "batch=2"])[0] for words in (one, two)]
        work = [spent["ours"] - start_up[0], spent["ours, 2 ranks"] - start_up[1]]
        print(f"  without start-up (the same of 2 pictures): 1 rank {work[0]:.1f} s, 2 ranks {work[1]:.1f} s in all")


MOMENTS = """
import sys, torch
from pathlib import Path
import numpy as np
from llamagen_dist.config import InceptionSection
from llamagen_dist.evaluation import frechet, inception_weights
from llamagen_dist.evaluation.features import Extraction, Selection
from llamagen_dist.evaluation.image_sets import ImageSet
from llamagen_dist.parallel.topology import Topology
from llamagen_dist.process import peak_rss_gb
from tests.unit.test_evaluation_memory import Quick

torch.set_num_threads(1)
class Made:
    def read(self, indices):
        return np.random.RandomState(int(indices[0])).randint(0, 256, (len(indices), 64, 64, 3)).astype(np.uint8)
n = int(sys.argv[1])
sets = [ImageSet(Path(name), n, 64, 64, None, None, Made(), {}, stored_size=(64, 64)) for name in ("made", "real")]
extractor = inception_weights.open_extractor(InceptionSection())
extractor.network(torch.zeros(64, 64, 64, 3, dtype=torch.uint8))  # what a batch of the real network takes
selections = [Selection(one, np.arange(n), np.arange(0)) for one in sets]
measured = Extraction(selections, Quick(), None, Topology(), batch=64).run()
frechet.frechet_distance(measured[0].fid, measured[1].fid), frechet.frechet_distance(measured[0].sfid, measured[1].sfid)
print(peak_rss_gb())
"""


def moments(images: int) -> None:
    """Features come from a stand-in that is quick; the network runs once, for the memory that a batch takes."""
    for n in (images // 10, images):
        seconds, said = cpu_seconds([sys.executable, "-c", MOMENTS, str(n)])
        print(f"moments of {n:,} against {n:,} images: {float(said):.2f} GB at most, {seconds:.0f} CPU s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--dimensions", type=int, default=2048)
    parser.add_argument("--points", type=int, default=6000)
    parser.add_argument("--folder", type=int, default=1000)
    parser.add_argument("--moments", type=int, default=0, help="such as 50000: memory of FID and sFID (minutes)")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.images:
        extraction(options.images, options.repeats)
    if options.dimensions:
        distances(options.dimensions)
    if options.points:
        precision_and_recall(options.points, options.repeats)
    if options.folder:
        folders(options.folder)
    if options.moments:
        moments(options.moments)


if __name__ == "__main__":
    main()
