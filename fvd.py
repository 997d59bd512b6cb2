"""FVD and its company, every number printed with the protocol behind it.

    python fvd.py --real ucf:UCF-101 --fake samples.npz                  # FVD at 2048 clips a side
    python fvd.py --real original.npz --fake reconstruction.npz          # rFVD, PSNR, SSIM, LPIPS, fLPIPS, flickering
    python fvd.py --real toy --fake samples.npz --features random        # offline: FD-random, which is not FVD
    python fvd.py --tokens out/dit/tokens-KEY.npy                        # is the latent Gaussian, dead, clustered?

Both sides go one way: clips, rounded to bytes -> network -> features (n, d), kept -> every statistic of them.
Letters: B videos (B, T, 3, R, R) in [-1, 1], T frames, R = H = W pixels, n and m clips of a side, d features of a clip.
"""
import dataclasses
import hashlib
import json
import warnings
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import build_dataset, load_lpips, parse_config, save_video, tile


@dataclass(frozen=True)
class Config:
    """Settings of one measurement: the paper's where it names them (Sec. 4.1: 2048 videos), the rest is choice."""

    dataset: str = "any"            # any|k600: row of presets; k600 shrinks clips to 64 x 64 before the features (LARP)
    real: str = ""                  # what is true: samples.npz, a folder of videos, ucf:PATH or toy
    fake: str = ""                  # what is judged: the same, but files lose quality, so give a samples.npz
    n: int = 2048                   # most clips of a side: one each of videos drawn by --seed
    frames: int = -1                # T; -1: as a samples.npz on either side, else 16 (toy 8); fewer are its first ones
    stride: int = -1                # step in the file between frames of a clip, 0 spreads; -1: as a samples.npz, else 1
    resolution: int = -1            # R, height and width in pixels; -1: as a samples.npz, else 128 (toy 32)
    split: str = "all"              # all, train, test or groups such as 1-19,23: of the real side and every ucf:PATH
    features: str = "i3d"           # i3d, random, or a TorchScript file: video (B, 3, T, R, R) in [-1, 1] -> (B, d)
    i3d: str = ""                   # path of i3d_torchscript.pt where it cannot be downloaded
    c3d: str = ""                   # path of StyleGAN-V's c3d_ucf101.pt: adds the Inception Score of C3D
    fvd_resolution: int = 0         # bring clips to this size just before the features; 0 leaves them
    bias_curve: bool = False        # the distance at n, n/2, n/4 .. clips of each side
    nearest: int = 0                # this many fake clips over their nearest real ones, in a png beside --out
    paired: bool = False            # PSNR, SSIM, LPIPS of clip i against clip i; on for sample.py --reconstruct's pair
    lpips_net: str = "auto"         # auto|alex|vgg|squeeze|none: of LPIPS, fLPIPS; auto: alex for a pair (choice)
    action_similarity: int = 0      # window in frames: cosine between the features of a long clip's windows
    tokens: str = ""                # token cache of nerv_dit.py, tokens-KEY.npy: statistics of the latent
    batch: int = 16                 # B, clips that go through a network at a time
    out: str = "out/fvd.json"       # the results; a sheet and the index of a folder go beside it
    seed: int = 0                   # fixes the drawn clips, halves, resamples and token noise


PRESETS = {"any": {}, "k600": dict(fvd_resolution=64)}
I3D_URLS = ("https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt?dl=1", "https://huggingface.co/flateon/"
            "FVD-I3D-torchscript/resolve/1c2d61711c52571ad617a1063e6fa691b212e184/i3d_torchscript.pt")
I3D_SHA256 = "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"
GET_I3D = f"get i3d_torchscript.pt (51,235,320 bytes, sha256 {I3D_SHA256}) from\n  " + "\n  ".join(I3D_URLS)


# ---------------------------------------------------------------------------------------------- statistics of features

def frechet_distance(a, b):
    """Squared distance between Gaussians fitted to two sets of features; biased upward by about c (1/n + 1/m).

    Shapes:  a (n, d), b (m, d) -> float
    Raises:  ValueError for fewer than 2 rows, unequal widths or values that are not finite
    Source:  FVD (arXiv 1812.01717). Choice: float64 and singular values; float32 and matrix roots miss by whole tenths
    """
    if min(len(a), len(b)) < 2 or a.shape[1] != b.shape[1] or not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError(f"features {tuple(a.shape)}, {tuple(b.shape)}: need 2 rows or more, one width, finite values")
    a, b = a.double(), b.double()
    # A covariance is R^T R, with R the triangle of the centred rows; trace sqrt(cov_a cov_b) is then the sum of the
    # singular values of R_a R_b^T, also where n <= d makes the covariance singular.
    r_a, r_b = (torch.linalg.qr(x - x.mean(0), mode="r").R / (len(x) - 1) ** 0.5 for x in (a, b))   # (min(n, d), d)
    cross = torch.linalg.svdvals(r_a @ r_b.T).sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + r_a.square().sum() + r_b.square().sum() - 2 * cross
    return max(0.0, distance.item())


def inception_score(probabilities):
    """exp of the mean KL of each clip's class probabilities from their average (arXiv 1606.03498). (n, k) -> float."""
    p = probabilities.double()
    return (torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))).sum(1).mean().exp().item()


def frechet_rows(name, real, fake, cfg):
    """The distance and how far to trust it. Shapes: real (n, d), fake (m, d) -> {name: (value, note)}."""
    rng, (n, d), m, half = torch.Generator().manual_seed(cfg.seed), real.shape, len(fake), len(real) // 2
    real, fake = real[torch.randperm(n, generator=rng)], fake[torch.randperm(m, generator=rng)]     # out of class order
    again = [frechet_distance(real, fake[torch.randint(m, (m,), generator=rng)]) for _ in range(5)]
    floor = frechet_distance(real[:half], real[half:])
    bias = floor * (1 / n + 1 / m) / (1 / half + 1 / (n - half))                    # it goes with 1/n + 1/m
    if min(n, m) < 2 * d:
        print(f"warning: {min(n, m)} clips are less than 2 x {d} features: {name} is biased upward by about {bias:.3g}")
    rows = {name: (frechet_distance(real, fake), f"{n} real, {m} fake clips; bias near {bias:.3g} if unpaired"),
            f"{name} spread": (float(np.std(again, ddof=1)), "standard deviation over 5 bootstraps of the fake side"),
            f"{name} floor": (floor, f"real against real, {half} against {n - half} other clips")}
    for k in (min(n, m) >> i for i in range(5) if cfg.bias_curve and min(n, m) >> i > 1):
        rows[f"{name} n={k}"] = frechet_distance(real[:k], fake[:k]), "bias curve, nearly a line against 1/n"
    return rows


# ---------------------------------------------------------------------------------------------- pixels

def psnr(a, b):
    """Peak signal-to-noise ratio of each frame in dB, 120 at most. Shapes: (..., T, 3, H, W) x 2 -> (..., T)."""
    check_pair(a, b)
    return -10 * ((a.double() - b.double()) / 2).square().mean((-3, -2, -1)).clamp(min=1e-12).log10()


def ssim(a, b):
    """Structural similarity of each frame, 1 where equal. Shapes: (..., T, 3, H, W) x 2 -> (..., T).

    Source:  Wang et al. 2004: Gaussian window 11 x 11, sigma 1.5, K1 0.01, K2 0.03; valid region, mean over RGB
    """
    check_pair(a, b)
    x, y = ((v.flatten(0, -4).double() + 1) / 2 for v in (a, b))                    # (frames, 3, H, W) in [0, 1]
    window = torch.exp(-(torch.arange(11, device=a.device).double() - 5) ** 2 / (2 * 1.5 ** 2))
    window = (window / window.sum()).expand(3, 1, 1, 11)
    blur = lambda v: F.conv2d(F.conv2d(v, window, groups=3), window.mT, groups=3)   # (frames, 3, H-10, W-10)
    mean_x, mean_y = blur(x), blur(y)
    variances, cov = blur(x * x) - mean_x ** 2 + blur(y * y) - mean_y ** 2, blur(x * y) - mean_x * mean_y
    light = (2 * mean_x * mean_y + 0.01 ** 2) / (mean_x ** 2 + mean_y ** 2 + 0.01 ** 2)
    return (light * (2 * cov + 0.03 ** 2) / (variances + 0.03 ** 2)).mean((1, 2, 3)).view(a.shape[:-3])


def lpips_distance(a, b, net):
    """Perceptual distance of each frame by an lpips.LPIPS network. Shapes: (..., T, 3, H, W) x 2 -> (..., T)."""
    check_pair(a, b)
    return net(a.flatten(0, -4), b.flatten(0, -4)).view(a.shape[:-3])


def check_pair(a, b):
    """ValueError where two videos cannot be compared pixel by pixel: other shapes, or values outside [-1, 1]."""
    peak = torch.maximum(a.abs().max(), b.abs().max()).item()
    if a.shape != b.shape or not peak <= 1.001:
        raise ValueError(f"{tuple(a.shape)} and {tuple(b.shape)}, pixels up to {peak:.4g}: need one shape and [-1, 1]")


# ---------------------------------------------------------------------------------------------- feature networks

def to_bytes(video):
    """What StyleGAN-V feeds; rounded, as truncation darkens. Shapes: (B, T, 3, R, R) -> (B, 3, T, R, R) uint8."""
    return ((video + 1) * 127.5).round().clamp(0, 255).byte().transpose(1, 2)


def load_torchscript(path, device, want=None):
    """A TorchScript network and its sha256, checked before the file is opened, because opening it runs its code."""
    try:
        sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        if want in (None, sha256):
            return torch.jit.load(path, map_location=device).eval(), sha256
    except (OSError, RuntimeError) as error:
        raise SystemExit(f"{path} is not TorchScript, the format of --features, --i3d and --c3d: {error}") from error
    raise SystemExit(f"{path} has sha256 {sha256}, not {want}, so it was not opened; {GET_I3D}")


def load_i3d(path="", device="cpu"):
    """The I3D of published FVDs: logits of Kinetics-400, averaged over time, from StyleGAN-V's TorchScript.

    Shapes:  -> function: video (B, T, 3, R, R) in [-1, 1] -> (B, 400), for T >= 10
    Raises:  SystemExit where the file is missing and cannot be downloaded, or has another sha256
    Source:  called as StyleGAN-V does: bytes in, rescaling and resizing to 224 x 224 inside
    """
    file = Path(path or Path(torch.hub.get_dir()) / "checkpoints" / "i3d_torchscript.pt")
    for url in () if path or file.exists() else I3D_URLS:
        try:                                            # to a temporary name, which is renamed when the hash fits
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), hash_prefix=I3D_SHA256)
            break
        except (OSError, RuntimeError) as error:
            print(f"no I3D from {url}: {error}")
    if not file.exists():
        raise SystemExit(f"{GET_I3D}\nput it at {file}, or give --i3d PATH, or --features random, which is not FVD")
    net, _ = load_torchscript(file, device, I3D_SHA256)
    return lambda video: net(to_bytes(video), rescale=True, resize=True, return_features=True)


def random_features(video):
    """Three fixed random 3-D convolutions, averaged over the clip. Shapes: (B, T, 3, R, R) -> (B, 400).

    Source:  choice: kernels without mean, or brightness drowns all else; every other one sees change over time alone,
             four times as strong, as motion is faint; the logarithm brings loud and quiet features to one scale
    """
    rng, x = torch.Generator().manual_seed(0), video.transpose(1, 2)                # (B, 3, T, R, R)
    for c_in, c_out, k, stride, pad in ((3, 32, 5, (1, 2, 2), (0, 2, 2)), (32, 64, 3, 2, 1), (64, 400, 3, 2, 1)):
        kernel = torch.randn(c_out, c_in, 3, k, k, generator=rng)
        kernel -= kernel.mean((1, 2, 3, 4), keepdim=True)
        if c_in == 3:
            kernel[::2] = 4 * (kernel[::2] - kernel[::2].mean(2, keepdim=True))
        kernel *= (2 / kernel[0].numel()) ** 0.5        # keeps the scale through a ReLU
        x = F.conv3d(x, kernel.to(x.device), stride=stride, padding=pad).relu()
    return (x.mean((2, 3, 4)) + 0.01).log()                                         # (B, 400)


def action_similarity(video, features, window):
    """Mean cosine between the features of every two windows of a clip. Shapes: (B, T, 3, R, R) -> (B, 1).

    Source:  paper E.6, Table A10. Departs: windows overlap by half, E.6 takes all; features of --features, not C3D's
    """
    parts = video.unfold(1, window, max(1, window // 2)).unbind(1)                  # w of (B, 3, R, R, window)
    f = torch.stack([F.normalize(features(part.movedim(-1, 1)), dim=-1) for part in parts])         # (w, B, d)
    return (f.sum(0).square().sum(-1, keepdim=True) - len(f)) / (len(f) * (len(f) - 1))     # |sum of f|^2 = w + cosines


# ---------------------------------------------------------------------------------------------- the two sides

class NpzVideos:
    """The clips of a samples.npz. They stay on the disk until they are asked for, as they may not fit into memory.

    Shapes:  self[i, seed] -> (T, 3, R, R) in [-1, 1], label int: as the datasets of data.py
    Raises:  SystemExit where the file is not ours
    """

    def __init__(self, path):
        try:
            archive = zipfile.ZipFile(path)
            if any(member.compress_type for member in archive.infolist()) or archive.testzip():     # before parsing
                raise ValueError("it is compressed, or damaged: its checksums do not agree with its contents")
            with np.load(path, allow_pickle=False) as file:
                self.labels, self.settings = file["labels"], dict(json.loads(str(file["settings"])))
            self.stream = archive.open("videos.npy")
            np.lib.format.read_magic(self.stream)
            self.shape, _, dtype = np.lib.format.read_array_header_1_0(self.stream)
            self.start, (n, T, R, *rest) = self.stream.tell(), self.shape
            if dtype != np.uint8 or rest != [R, 3] or n != len(self.labels):
                raise ValueError(f"{dtype} videos {self.shape}, {len(self.labels)} labels, not uint8 (n, T, R, R, 3)")
            if self.start + int(np.prod(self.shape)) != archive.getinfo("videos.npy").file_size:
                raise ValueError(f"it claims {self.shape} and holds another number of bytes")
        except Exception as error:                      # whatever a hostile file makes the readers raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise SystemExit(f"{path} is not a samples.npz of sample.py: {reason}") from error
        self.kind = dict(frames=T, stride=self.settings.get("stride", 1), resolution=R)
        self.classes = self.settings.get("classes") or []

    def __getitem__(self, key):
        i, size = key[0], int(np.prod(self.shape[1:]))
        self.stream.seek(self.start + i * size)
        video = torch.frombuffer(bytearray(self.stream.read(size)), dtype=torch.uint8).view(self.shape[1:])
        return video.permute(0, 3, 1, 2) / 127.5 - 1, int(self.labels[i])           # (T, 3, R, R)


def open_sides(cfg):
    """Both sides as datasets, and cfg with the frames, stride and resolution of the samples.npz among them."""
    files = {spec: NpzVideos(spec) for spec in (cfg.real, cfg.fake) if spec.endswith(".npz")}
    toy, sides = "toy" in (cfg.real, cfg.fake), []
    for key, value in dict(frames=8 if toy else 16, stride=1, resolution=32 if toy else 128).items():
        values = {file.kind[key] for file in files.values()} or {value}
        if getattr(cfg, key) < 0 and len(values) > 1:
            raise SystemExit(f"the sides differ in {key}, {sorted(values)}: choose with --{key}")
        cfg = dataclasses.replace(cfg, **{key: min(values) if getattr(cfg, key) < 0 else getattr(cfg, key)})
    for spec, split in ((cfg.real, cfg.split), (cfg.fake, cfg.split if cfg.fake.startswith("ucf:") else "all")):
        root, kind = Path(spec.removeprefix("ucf:")), files[spec].kind if spec in files else vars(cfg)
        if spec != "toy" and spec not in files and not root.is_dir():
            raise SystemExit(f"{spec} is no folder; a side is a samples.npz, a folder of videos, ucf:PATH or toy")
        if kind["frames"] < cfg.frames or kind["resolution"] != cfg.resolution:
            raise SystemExit(f"{spec} has {kind}, which --frames {cfg.frames} --resolution {cfg.resolution} cannot use")
        wanted = dict(vars(cfg), dataset="toy" if spec == "toy" else "folder", data_root=root, split=split, flip=False,
                      in_memory=False)
        wanted["out"] = Path(cfg.out).parent / f"index-{root.name}"
        sides.append(files.get(spec) or build_dataset(SimpleNamespace(**wanted)))
        if min(cfg.n, len(sides[-1].labels)) < 4:
            raise SystemExit(f"{spec} has {len(sides[-1].labels)} clips, --n is {cfg.n}: 4 are the least")
    return *sides, cfg


def drawn(side, cfg):
    """The numbers of the clips that are measured: up to n, one a video, drawn by the seed, in the order of the disk."""
    return np.sort(np.random.default_rng(cfg.seed).permutation(len(side.labels))[:cfg.n])


def read(side, numbers, cfg):
    """Clips by number, on the levels of bytes, the same for every side. Shapes: (b,) -> (b, T, 3, R, R)."""
    clips = torch.stack([side[int(i), [cfg.seed, int(i)]][0][:cfg.frames] for i in numbers])        # (b, T, 3, R, R)
    return ((clips + 1) * 127.5).round() / 127.5 - 1


def measure(sides, functions, cfg, device):
    """Read the sides once, in step, in batches. {name: f(one (b, T, 3, R, R) a side) -> (b, k)} -> {name: (n, k)}."""
    kept, numbers = {}, [drawn(side, cfg) for side in sides]
    for i in tqdm(range(0, len(numbers[0]), cfg.batch), desc="clips", unit="batch"):
        videos = [read(side, which[i:i + cfg.batch], cfg).to(device) for side, which in zip(sides, numbers)]
        for name, function in functions.items():
            found = function(*videos)                                               # (b, k)
            # Filled in place: small tensors that stay between large ones that go would keep the memory growing.
            kept.setdefault(name, torch.empty(len(numbers[0]), found.shape[1]))[i:i + cfg.batch] = found
    return kept


# ---------------------------------------------------------------------------------------------- weight tokens

def kmeans(x, k, seed):
    """Lloyd's algorithm from k-means++ centres. Shapes: x (n, d) -> (n,) cluster 0..k-1."""
    rng = torch.Generator().manual_seed(seed)
    centres = x[torch.randint(len(x), (1,), generator=rng)]
    while len(centres) < k:
        far = torch.cdist(x, centres).amin(1).square() + 1e-12
        centres = torch.cat([centres, x[torch.multinomial(far, 1, generator=rng)]])                 # (k, d) at last
    for _ in range(50):
        cluster = torch.cdist(x, centres).argmin(1)
        count = torch.bincount(cluster, minlength=k)[:, None]
        total = torch.zeros_like(centres).index_add_(0, cluster, x)
        centres = torch.where(count > 0, total / count.clamp(min=1), centres)
    return cluster


def purity_and_nmi(cluster, source):
    """Share of rows in their cluster's commonest source; mutual information over mean entropy. (n,) twice -> floats."""
    joint = torch.zeros(int(cluster.max()) + 1, int(source.max()) + 1, dtype=torch.float64)
    joint.index_put_((cluster, source), torch.tensor(1 / len(source), dtype=torch.float64), accumulate=True)
    entropy = lambda p: -torch.xlogy(p, p).sum().item()
    each = entropy(joint.sum(0)) + entropy(joint.sum(1))
    return joint.amax(1).sum().item(), 2 * (each - entropy(joint)) / max(each, 1e-12)


def token_rows(path, seed):
    """Statistics of a token cache, read 256 clips at a time. Returns {name: (value, note)}.

    Source:  paper Tables A11, A13. Departs: A11's clips are also cropped at random in space. Choice: moments over all
             values of the sampled tokens that stage 2 sees; a dim is dead where the variance of its mean over clips is
             below 0.01 (Burda et al., arXiv 1509.00519)
    """
    try:
        cache = np.load(path, mmap_mode="r")
        M, _, N, d = cache.shape
        video = np.array(json.loads(Path(path).with_suffix(".json").read_text())["videos"]).reshape(M)
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise SystemExit(f"{path} is not a token cache of nerv_dit.py, npy with json beside it: {error}") from error
    rng, sums, powers = torch.Generator().manual_seed(seed), torch.zeros(3, N, d).double(), torch.zeros(4).double()
    for start in tqdm(range(0, M, 256), desc="tokens", unit="batch"):
        mean, logvar = torch.from_numpy(cache[start:start + 256, :2].astype(np.float64)).unbind(1)  # (b, N, d) each
        z = mean + (logvar / 2).exp() * torch.randn(mean.shape, generator=rng, dtype=torch.float64)
        powers += torch.stack([(z ** p).sum() for p in (1, 2, 3, 4)]) / (M * N * d)
        sums += torch.stack([v.sum(0) for v in (mean, mean ** 2, mean ** 2 + logvar.exp() - 1 - logvar)]) / M
    m, m2, m3, m4 = powers.tolist()
    var = m2 - m ** 2
    rows = {"mean": (m, f"of sampled tokens, {M} clips of {N} x {d}"), "std": (var ** 0.5, "the prior has 1"),
            "skew": ((m3 - 3 * m * m2 + 2 * m ** 3) / var ** 1.5, "a Gaussian has 0"),
            "kurtosis": ((m4 - 4 * m * m3 + 6 * m ** 2 * m2 - 3 * m ** 4) / var ** 2 - 3, "excess: a Gaussian has 0"),
            "dead dims": ((sums[1] - sums[0] ** 2 < 0.01).double().mean().item(), "share whose mean varies by < 0.01"),
            "KL per dim": (sums[2].mean().item() / 2, "nats, mean over clips, tokens and channels")}
    chosen = np.random.default_rng(seed).permutation(np.flatnonzero(np.bincount(video) > 1))[:100]
    if len(chosen) > 1:                                 # both depend on how many videos there are, so that is said
        where = np.flatnonzero(np.isin(video, chosen))
        source = torch.from_numpy(np.unique(video[where], return_inverse=True)[1])                  # (rows,)
        cluster = kmeans(torch.from_numpy(cache[where, 0].astype(np.float32)).flatten(1), len(chosen), seed)
        chance = purity_and_nmi(cluster, source[torch.randperm(len(source), generator=rng)])
        for name, value, luck in zip(("purity", "NMI"), purity_and_nmi(cluster, source), chance):
            rows[name] = value, f"k-means, {len(where)} clips of {len(chosen)} videos; shuffled videos give {luck:.3f}"
    return rows


# ---------------------------------------------------------------------------------------------- command line

def nearest_rows(real, fake, found, cfg):
    """Is it memorised? A sheet of fake clips, each over the real ones nearest in features and in pixels; one row."""
    chosen = np.unique(np.linspace(0, len(found["fake"]["features"]) - 1, cfg.nearest).astype(int))
    near = [torch.cdist(found["fake"][key][chosen], found["real"][key]).argmin(1) for key in ("features", "thumbnail")]
    clips = [read(fake, drawn(fake, cfg)[chosen], cfg), *(read(real, drawn(real, cfg)[places], cfg) for places in near)]
    trios = torch.stack(clips, 1).flatten(0, 1)                                     # (3k, T, 3, R, R)
    shown = trios[:, np.linspace(0, cfg.frames - 1, min(8, cfg.frames)).astype(int)]                # (3k, 8, 3, R, R)
    sheet = Path(cfg.out).with_suffix(".png")
    save_video(sheet, tile(shown.flatten(0, 1)[:, None], shown.shape[1]))
    a, b = found["fake"]["features"], found["real"]["features"]
    among = torch.cdist(b, b).fill_diagonal_(torch.inf).amin(1).median()
    note = f"median distance in features, {among:.4g} between real clips; {sheet}: fake, nearest in features, in pixels"
    return {"nearest real": (torch.cdist(a, b).amin(1).median().item(), note)}


@torch.no_grad()
def compare(cfg):
    """Measure the fake side against the real one. Returns {name: (value, note)} and the protocol."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("highest")       # TF32 would move the numbers from card to card
    torch.backends.cudnn.allow_tf32 = False
    real, fake, cfg = open_sides(cfg)
    window, least = cfg.action_similarity, 10 if cfg.features == "i3d" else 3
    if cfg.frames < max(least, 16 if cfg.c3d else 0, window * 3 // 2) or 0 < window < least:
        raise SystemExit("too few --frames: I3D needs 10, --features random 3, C3D 16, --action-similarity 1.5 windows")
    about = {"real": getattr(real, "settings", {}), "fake": getattr(fake, "settings", {})}
    pair = cfg.paired or "pair" in about["real"] and about["real"]["pair"] == about["fake"].get("pair")
    lpips_net = cfg.lpips_net if cfg.lpips_net != "auto" else "alex" if pair else "none"
    if pair and len(real.labels) != len(fake.labels):
        raise SystemExit(f"pairs need equally many clips, not {len(real.labels)} and {len(fake.labels)}")
    if cfg.resolution < 32 and (pair or lpips_net != "none"):
        raise SystemExit(f"SSIM and LPIPS need 32 x 32 pixels or more, not --resolution {cfg.resolution}")

    if cfg.features == "i3d":
        network, name, sha256 = load_i3d(cfg.i3d, device), "FVD", I3D_SHA256
    elif cfg.features != "random":
        other, sha256 = load_torchscript(cfg.features, device)
        network, name = lambda video: other(video.transpose(1, 2)).flatten(1), f"FD-{Path(cfg.features).stem}"
    else:
        network, name, sha256 = random_features, "FD-random", "none: drawn from seed 0"
        print("FD-random is not FVD: random convolutions rank damage to footage, but know no objects and no actions, "
              "and no published number compares with it")
    c3d = load_torchscript(cfg.c3d, device)[0] if cfg.c3d else None
    net = load_lpips(lpips_net, device) if lpips_net != "none" else None

    def features(video):
        if cfg.fvd_resolution:
            small = F.interpolate(video.flatten(0, 1), [cfg.fvd_resolution] * 2, mode="bilinear", antialias=True)
            video = ((small.unflatten(0, video.shape[:2]) + 1) * 127.5).round() / 127.5 - 1         # (B, T, 3, r, r)
        return network(video)

    each = {"features": features, "flickering": lambda video: 1 - video.diff(dim=1).abs().mean((2, 3, 4)) / 2}
    if cfg.c3d:
        each["c3d"] = lambda video: c3d(to_bytes(video[:, :16]))
    if cfg.nearest:
        each["thumbnail"] = lambda video: F.adaptive_avg_pool3d(video.transpose(1, 2), (4, 16, 16)).flatten(1)
    if window:
        each["action similarity"] = lambda video: action_similarity(video, features, window)
    both = {"PSNR": psnr, "SSIM": ssim} if pair else {}
    if net:
        each["fLPIPS"] = lambda video: lpips_distance(video[:, 1:], video[:, :-1], net)
        both.update({"LPIPS": lambda a, b: lpips_distance(a, b, net)} if pair else {})
    found = {title: measure([side], each, cfg, device) for title, side in (("real", real), ("fake", fake))}
    rows = frechet_rows(name, found["real"]["features"], found["fake"]["features"], cfg)
    notes = {"flickering": "VBench's formula, 1 for a still", "fLPIPS": f"neighbouring frames, {lpips_net}",
             "action similarity": f"{window}-frame windows", "LPIPS": lpips_net}
    for title, kept in found.items():
        if name == "FVD":
            rows[f"IS {title}"] = inception_score(kept["features"].softmax(1)), "of I3D's 400 classes, one split"
        if cfg.c3d:
            rows[f"IS-C3D {title}"] = inception_score(kept["c3d"]), "of C3D's classes, first 16 frames, one split"
        rows.update({f"{key} {title}": (kept[key].mean().item(), note) for key, note in notes.items() if key in kept})
    for key, value in (measure([real, fake], both, cfg, device) if pair else {}).items():
        rows[key] = value.mean().item(), f"mean over the frames of {len(value)} pairs; {notes.get(key, 'no network')}"
    if name == "FVD":
        black, white = (network(torch.full((1, 30, 3, 64, 64), value, device=device)) for value in (-1.0, 1.0))
        rows["I3D check"] = (black - white).square().sum().item(), "black against white; 151.26 elsewhere"
    if cfg.nearest:
        rows.update(nearest_rows(real, fake, found, cfg))

    protocol = {key: value for key, value in vars(cfg).items() if value != ""}
    protocol.update(resize_filter="shorter side, bilinear, antialias; centre crop; rounded to bytes", device=device,
                    lpips_net=lpips_net, features_sha256=sha256, torch=torch.__version__)
    for title, side in (("real", real), ("fake", fake)):
        labels = side.labels[drawn(side, cfg)]
        names = (side.classes[k] if 0 <= k < len(side.classes) else str(k) for k in labels)
        protocol.update({f"{title}_clips": f"{len(labels)} of {len(side.labels)}", f"{title}_labels": Counter(names)})
        protocol.update({f"{title}_{key}": value for key, value in about[title].items() if key != "classes"})
    return rows, protocol


def main(argv=None):
    """Command line: print the table and its protocol, write both to --out. Returns that path."""
    cfg = parse_config(Config, PRESETS, argv)
    warnings.filterwarnings("ignore", module=r"torch(vision)?\.")       # deprecations that lpips and torch have to mend
    if bool(cfg.real) != bool(cfg.fake) or not (cfg.real or cfg.tokens):
        raise SystemExit("nothing to measure: give both --real A and --fake B, or --tokens PATH")
    if cfg.batch < 1:
        raise SystemExit(f"--batch {cfg.batch} is no number of clips; 1 is the least")
    rows, protocol = compare(cfg) if cfg.real else ({}, dict(tokens=cfg.tokens, seed=cfg.seed))
    if cfg.tokens:
        rows.update(token_rows(cfg.tokens, cfg.seed))
    for name, (value, note) in rows.items():
        print(f"{name:<24}{value:>12.5g}   {note}")
    for key, value in protocol.items():
        if isinstance(value, Counter):
            value = f"{len(value)} classes, {min(value.values())} to {max(value.values())} clips each"
        print(f"  {key:<20}{value}")
    path, results = Path(cfg.out), {name: dict(value=value, note=note) for name, (value, note) in rows.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(results=results, protocol=protocol), indent=1))
    return path


if __name__ == "__main__":
    main()
