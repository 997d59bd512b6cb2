"""FVD and its company, every number printed with the protocol behind it.

    python fvd.py --real UCF-101 --fake out/samples                 # FVD at 2048 clips a side
    python fvd.py --real out/rec --fake out/rec                     # sample.py --reconstruct's pair: rFVD, PSNR
    python fvd.py --real UCF-101 --fake out/long --frames 128 --action-similarity 16    # Tables A9, A10
    python fvd.py --dataset k600 --real k600/val --fake out/k600    # features of 64 x 64 pixels
    python fvd.py --real toy --fake out/samples --features random   # offline: FD-random, which is not FVD
    python fvd.py --tokens out/vae/tokens-KEY.npy                   # is the latent Gaussian, dead, clustered?
    python fvd.py --real toy --fake out/samples --features random --n 16384 \\
        --novelty 8 --tokens out/vae/tokens-KEY.npy                 # are the samples new, or remembered?

Both sides go one way: clips, rounded to bytes -> network -> features (n, d), kept -> every statistic.
A folder that sample.py wrote is read through its clips on disk, samples.npy, never through its mp4.
Letters: B videos (B, T, 3, R, R) in [-1, 1], T frames, R = H = W pixels, n and m clips of a side,
         d features of a clip.
"""
import json
import re
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from data import (Videos, alone, build_dataset, file_hash, from_uint8, load_lpips, parse_config,
                  progress, psnr, save_video, tile, to_uint8, write_file)


@dataclass(frozen=True)
class Config:
    """Settings of one measurement: the paper's where it names them (Sec. 4.1: 2048 videos), else choice.

    A side is a folder of videos, what sample.py wrote (its folder, or a .npy in it), or toy.
    """

    dataset: str = "any"            # any|k600: row of presets; k600 measures at 64 x 64 (LARP)
    real: str = ""                  # the side that is true; with --novelty, what trained
    fake: str = ""                  # the side that is judged; mp4 files have lost quality
    n: int = 2048                   # 4..: most clips of a side, one of each video, drawn by --seed
    frames: int = -1                # -1..: T, the first ones of a clip; -1: as on disk, else 16
    stride: int = -1                # -1..: from frame to frame, 0 spreads; -1: as on disk, else 1
    resolution: int = -1            # -1..: R, height and width; -1: as on disk, else 128
    split: str = "all"              # of the real side: all, train, test or groups such as 1-19,23
    features: str = "i3d"           # i3d, random, or TorchScript: (B, 3, T, R, R) -> (B, d)
    i3d: str = ""                   # path of i3d_torchscript.pt where it cannot be downloaded
    c3d: str = ""                   # path of StyleGAN-V's c3d_ucf101.pt: adds C3D's Inception Score
    fvd_resolution: int = 0         # 0..: size of clips just before the features; 0 leaves them
    novelty: int = 0                # 0..64: new or remembered? and a picture of so many pairs
    paired: bool = False            # PSNR, SSIM, LPIPS of clip i with clip i; on for --reconstruct
    lpips_net: str = "auto"         # auto|alex|vgg|squeeze|none: auto is alex for a pair (choice)
    action_similarity: int = 0      # 0..: frames of a window; cosine between a clip's windows
    tokens: str = ""                # cache of nerv_dit.py: statistics of the latent, and --novelty
    batch: int = 16                 # 1..: B, clips that go through a network at a time
    out: str = "out/fvd.json"       # results; a picture and the index of a folder go beside it
    seed: int = 0                   # 0..4294967295: fixes the draws, and toy clips (as in training)


PRESETS = {"any": {}, "k600": dict(fvd_resolution=64)}


# ------------------------------------------------------------------------------------------ distances

def frechet_distance(a, b):
    """Squared distance between Gaussians fitted to two sets of features.

    It is biased upward by about c (1/n + 1/m).

    Shapes:  a (n, d), b (m, d) -> float
    Raises:  ValueError for fewer than 2 rows, unequal widths or values that are not finite
    Source:  paper (Sec. 4.1), FVD of arXiv 1812.01717
             choice (not said): float64 and singular values; float32 and matrix roots miss by tenths
    """
    finite = a.isfinite().all() and b.isfinite().all()
    if min(len(a), len(b)) < 2 or a.shape[1] != b.shape[1] or not finite:
        raise ValueError(f"features {tuple(a.shape)}, {tuple(b.shape)}: need 2 rows, one width, "
                         "finite values")
    a = a.double()
    b = b.double()
    root_a = covariance_root(a)
    root_b = covariance_root(b)
    shift = (a.mean(0) - b.mean(0)).square().sum()
    spread = root_a.square().sum() + root_b.square().sum()              # trace of both covariances
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()               # trace sqrt(cov_a cov_b)
    return max(0.0, (shift + spread - 2 * cross).item())


def covariance_root(x):
    """R with R^T R = covariance of the rows, which may be singular. Shapes: (n, d) -> (min(n, d), d)."""
    return torch.linalg.qr(x - x.mean(0), mode="r").R / (len(x) - 1) ** 0.5


def inception_score(probabilities):
    """exp of the mean KL of each clip's class probabilities from their average. Shapes: (n, k) -> float.

    Source:  paper (Table 1), IS of arXiv 1606.03498
             choice (not said): one split, as a tenth of the clips scores too low
    """
    p = probabilities.double()
    kl = torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))                  # (n, k)
    return kl.sum(1).mean().exp().item()


def ssim(a, b):
    """Structural similarity of each frame, 1 where equal.

    Shapes:  a and b (..., T, 3, H, W) in [-1, 1] -> (..., T)
    Source:  paper (Table A4), SSIM of Wang et al. 2004
             choice (not said): no padding, mean over red, green and blue
    """
    x = (a.flatten(0, -4).double() + 1) / 2                             # (frames, 3, H, W) in [0, 1]
    y = (b.flatten(0, -4).double() + 1) / 2
    mean_x = blur(x)
    mean_y = blur(y)
    variances = blur(x * x) - mean_x ** 2 + blur(y * y) - mean_y ** 2
    covariance = blur(x * y) - mean_x * mean_y
    light = (2 * mean_x * mean_y + 0.01 ** 2) / (mean_x ** 2 + mean_y ** 2 + 0.01 ** 2)
    structure = (2 * covariance + 0.03 ** 2) / (variances + 0.03 ** 2)
    return (light * structure).mean((1, 2, 3)).view(a.shape[:-3])


def blur(x):
    """SSIM's Gaussian window: 11 x 11, sigma 1.5. Shapes: (n, 3, H, W) -> (n, 3, H - 10, W - 10)."""
    offset = torch.arange(11, device=x.device, dtype=x.dtype) - 5
    window = torch.exp(-offset ** 2 / (2 * 1.5 ** 2))
    window = (window / window.sum()).expand(3, 1, 1, 11)
    x = F.conv2d(x, window, groups=3)
    return F.conv2d(x, window.mT, groups=3)


def lpips_distance(a, b, net):
    """Distance of each frame by an lpips.LPIPS network. Shapes: (..., T, 3, H, W) twice -> (..., T)."""
    return net(a.flatten(0, -4), b.flatten(0, -4)).view(a.shape[:-3])


# ------------------------------------------------------------------------------------------ features of a clip

def random_features(video):
    """Three fixed random 3-D convolutions, averaged over the clip. Shapes: (B, T, 3, R, R) -> (B, 400).

    Source:  choice (not said): kernels without mean, or brightness drowns all else; every other one
             sees change over time alone, four times as strong, as motion is faint; the logarithm
             brings loud and quiet features to one scale
    """
    rng = torch.Generator().manual_seed(0)
    x = video.transpose(1, 2)                                           # (B, 3, T, R, R)
    layers = (
        (3, 32, 5, (1, 2, 2), (0, 2, 2)),
        (32, 64, 3, 2, 1),
        (64, 400, 3, 2, 1),
    )
    for c_in, c_out, size, stride, padding in layers:
        kernel = torch.randn(c_out, c_in, 3, size, size, generator=rng)
        kernel -= kernel.mean((1, 2, 3, 4), keepdim=True)
        if c_in == 3:
            kernel[::2] = 4 * (kernel[::2] - kernel[::2].mean(2, keepdim=True))
        kernel *= (2 / kernel[0].numel()) ** 0.5        # keeps the scale through a ReLU
        x = F.conv3d(x, kernel.to(x.device), stride=stride, padding=padding)
        x = x.relu()
    return (x.mean((2, 3, 4)) + 0.01).log()                             # (B, 400)


def action_similarity(video, features, window):
    """Mean cosine between the features of every two windows of a clip. Shapes: (B, T, 3, R, R) -> (B, 1).

    Source:  paper (E.6, Table A10)
             departs (E.6 takes all windows, and C3D): ours overlap by half, as neighbours are nearly
             equal, and the features are those of --features, as the public C3D gives probabilities
    """
    unit = []
    for part in video.unfold(1, window, max(1, window // 2)).unbind(1):
        part = part.movedim(-1, 1)                                      # (B, window, 3, R, R)
        unit.append(F.normalize(features(part), dim=-1))
    w = len(unit)
    total = torch.stack(unit).sum(0).square().sum(-1, keepdim=True)     # (B, 1): w ones and all cosines
    return (total - w) / (w * (w - 1))


# ------------------------------------------------------------------------------------------ new or remembered?

def nearest_two(x, bank, video, own=None, width=1.0):
    """How far each clip is from its nearest training clip, and from the nearest one of any other video.

    Mirrored or cut elsewhere, clips of one video resemble each other, so the second is another's.
    Shapes:  x (n, ...), bank (M, ...), video (M,) that a clip of the bank is from, own (n,) a video
             to leave out -> first (n,), second (n,), place of the first in the bank (n,)
    Units:   differences are counted in `width`
    Raises:  ValueError where there is no other video
    """
    x = torch.as_tensor(x / width).flatten(1)
    parts = []
    for start in range(0, len(bank), 1024):                             # the bank may be a file
        part = torch.as_tensor(bank[start:start + 1024] / width)
        parts.append(torch.cdist(x, part.float().flatten(1)))
    distance = torch.cat(parts, 1)                                      # (n, M)
    if own is not None:
        distance[own[:, None] == video] = torch.inf
    first, place = distance.min(1)
    distance[video[place][:, None] == video] = torch.inf
    second = distance.amin(1)
    if second.isinf().any():
        raise ValueError("new or remembered? takes training clips of 3 videos or more")
    return first, second, place


def novelty(first, second):
    """Medians of both distances and of their ratio, and the share of copies. (n,), (n,) -> {name: float}.

    Source:  choice (not said): a copy has first < second / 3, as in arXiv 2310.02664. What a
             tokenizer blurs may miss its third, so the ratio stands beside the share, to be read
             between the two ends of the scale
    """
    ratio = first / second.clamp(min=1e-12)
    return dict(
        nearest=first.median().item(),
        second=second.median().item(),
        ratio=ratio.median().item(),
        share=(ratio < 1 / 3).double().mean().item(),
    )


# ------------------------------------------------------------------------------------------ weight tokens

def token_statistics(cache, video, seed):
    """Is the latent Gaussian, is a part of it dead, do clips of one video lie together?

    Returns {name: (value, note)}
    Shapes:  cache (M, 2 or 3, N, d): mean, log-variance; video (M,) that a row is from
    Source:  paper (Tables A11, A13)
             choice (not said): 2048 rows, all values of the tokens as stage 2 draws them; a dimension
             is dead where its mean varies by less than 0.01 over clips (arXiv 1509.00519)
             departs (A11 also crops at random in space): the cache holds what stage 2 learns from
    """
    rng = np.random.default_rng(seed)
    mean, logvar, z = draw_tokens(cache, rng.permutation(len(cache))[:2048], seed)
    standard = (z - z.mean()) / z.std()
    dead = mean.var(0) < 0.01                                           # (N, d)
    kl = (mean.square() + logvar.exp() - 1 - logvar) / 2                # (b, N, d)
    rows = {
        "mean": (z.mean(), f"of sampled tokens, {len(z)} of {len(cache)} clips"),
        "std": (z.std(), "the prior has 1"),
        "skew": ((standard ** 3).mean(), "a Gaussian has 0"),
        "kurtosis": ((standard ** 4).mean() - 3, "excess: a Gaussian has 0"),
        "dead dims": (dead.float().mean(), "share whose mean varies by < 0.01"),
        "KL per dim": (kl.mean(), "nats, mean over clips, tokens and channels"),
    }
    several = np.flatnonzero(np.bincount(video) > 1)                    # videos with more than one clip
    if len(several) > 1:
        chosen = np.isin(video, rng.permutation(several)[:100])         # (M,)
        tokens = torch.from_numpy(cache[chosen, 0]).float().flatten(1)
        source = torch.from_numpy(video[chosen]).unique(return_inverse=True)[1]
        k = int(source.max()) + 1
        cluster = kmeans(tokens, k, seed)
        luck = purity_and_nmi(cluster, source[rng.permutation(len(source))])
        found = purity_and_nmi(cluster, source)
        rows["purity"] = (found[0], f"{k} videos; where videos are shuffled {luck[0]:.3f}")
        rows["NMI"] = (found[1], f"{len(source)} clips; where videos are shuffled {luck[1]:.3f}")
    return rows


def draw_tokens(cache, rows, seed):
    """Mean, log-variance and a draw of the posterior for some rows of a cache. -> three of (b, N, d)."""
    mean, logvar = torch.from_numpy(cache[rows, :2]).float().unbind(1)
    if not (mean.isfinite().all() and logvar.isfinite().all()):
        raise ValueError("the token cache holds values that are not finite; make it anew")
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed))
    return mean, logvar, mean + (logvar / 2).exp() * noise


def kmeans(x, k, seed):
    """Lloyd's algorithm from k-means++ centres. Shapes: x (n, d) -> (n,) cluster 0..k-1."""
    rng = torch.Generator().manual_seed(seed)
    centres = x[torch.randint(len(x), (1,), generator=rng)]
    while len(centres) < k:
        far = torch.cdist(x, centres).amin(1).square() + 1e-12
        row = torch.multinomial(far, 1, generator=rng)
        centres = torch.cat([centres, x[row]])
    for _ in range(50):
        cluster = torch.cdist(x, centres).argmin(1)
        member = F.one_hot(cluster, k).float()                          # (n, k)
        centres = member.T @ x / member.sum(0).clamp(min=1)[:, None]
    return cluster


def purity_and_nmi(cluster, source):
    """Share of rows in their cluster's commonest source; mutual information over mean entropy.

    Shapes:  cluster (n,), source (n,) -> two floats
    """
    joint = F.one_hot(cluster).T.double() @ F.one_hot(source).double() / len(source)
    entropies = entropy(joint.sum(0)) + entropy(joint.sum(1))
    information = entropies - entropy(joint)
    return joint.amax(1).sum().item(), 2 * information / max(entropies, 1e-12)


def entropy(p):
    """In nats, of probabilities of any shape."""
    return -torch.xlogy(p, p).sum().item()


# ------------------------------------------------------------------------------------------ the measurement

class Meter:
    """What is asked of a clip and of a pair of clips, and the networks that answer."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.name, self.network, self.sha256 = load_features(cfg, self.device)
        self.c3d = None
        self.lpips = None
        if cfg.c3d:
            self.c3d, _ = load_torchscript(cfg.c3d, self.device)
        if cfg.lpips_net != "none":
            self.lpips = load_lpips(cfg.lpips_net, self.device)

    def features(self, video):
        """Shapes: (B, T, 3, R, R) -> (B, d)."""
        size = self.cfg.fvd_resolution
        if size:
            frames = video.flatten(0, 1)                                # (B * T, 3, R, R)
            frames = F.interpolate(frames, (size, size), mode="bilinear", antialias=True)
            video = round_to_bytes(frames).unflatten(0, video.shape[:2])
        return self.network(video)

    def of_clip(self, video):
        """All that a clip says by itself. Shapes: (B, T, 3, R, R) -> {name: (B, k)}.

        Source:  choice (not said): the pixels of --novelty are means of 4 x 8 x 8 cells of a clip
        """
        found = dict(features=self.features(video))
        found["pixels"] = F.adaptive_avg_pool3d(video.transpose(1, 2), (4, 8, 8)).flatten(1)
        found["flickering"] = 1 - video.diff(dim=1).abs().mean((2, 3, 4)) / 2
        if self.c3d:
            found["c3d"] = self.c3d(to_bytes(video[:, :16]))
        if self.lpips:
            found["fLPIPS"] = lpips_distance(video[:, 1:], video[:, :-1], self.lpips)
        window = self.cfg.action_similarity
        if window:
            found["action similarity"] = action_similarity(video, self.features, window)
        return found

    def of_pair(self, real, fake):
        """Shapes: (B, T, 3, R, R) twice -> {name: (B, T)}."""
        found = dict(PSNR=psnr(real, fake), SSIM=ssim(real, fake))
        if self.lpips:
            found["LPIPS"] = lpips_distance(real, fake, self.lpips)
        return found

    def measure(self, function, places, *sides):
        """Read the sides in step, in batches; keep what the function says. Returns {name: (n, k)}."""
        kept = {}
        batch = self.cfg.batch
        for start in progress(range(0, len(places), batch), desc="clips", unit="batch"):
            rows = slice(start, start + batch)
            videos = [side.read(places[rows]).to(self.device) for side in sides]
            for name, value in function(*videos).items():
                # In place: small tensors that stay between large ones that go make memory grow.
                if name not in kept:
                    kept[name] = torch.empty(len(places), value.shape[1])
                kept[name][rows] = value
        return kept


@torch.no_grad()
def compare(cfg):
    """Measure the fake side against the real one. Returns what `report` takes."""
    real, fake, cfg = open_sides(cfg)
    copies = {}
    picture = None
    if cfg.novelty:
        copies = look_for_copied_tokens(fake, cfg)
    meter = Meter(cfg)
    of_real = meter.measure(meter.of_clip, range(len(real)), real)
    of_fake = meter.measure(meter.of_clip, range(len(fake)), fake)
    rows = distance_rows(meter.name, of_real["features"], of_fake["features"], cfg.seed)
    rows.update(clip_rows("real", of_real, cfg))
    rows.update(clip_rows("fake", of_fake, cfg))
    if cfg.paired:
        of_pairs = meter.measure(meter.of_pair, range(len(real)), real, fake)
        for name, value in of_pairs.items():
            rows[name] = (value.mean(), f"mean over the frames of {len(value)} pairs")
    if cfg.features == "i3d":
        rows["I3D check"] = (check_i3d(meter), "black against white; 151.26 elsewhere")
    if cfg.novelty:
        copied_clips, picture = look_for_copies(real, fake, of_real, of_fake, meter)
        copies = copied_clips | copies
    return dict(rows=rows, copies=copies, picture=picture, protocol=protocol_of(real, fake, meter))


def main(argv=None):
    """Command line: print the tables and their protocol, write them to --out. Returns that path."""
    alone("fvd.py")
    cfg = parse_config(Config, PRESETS, argv)
    if bool(cfg.real) != bool(cfg.fake) or not (cfg.real or cfg.tokens):
        raise SystemExit("nothing to measure: give both --real A and --fake B, or --tokens PATH")
    warnings.filterwarnings("ignore", module=r"torch(vision)?\.")       # lpips causes them
    torch.set_float32_matmul_precision("highest")       # TF32 moves the numbers from card to card
    torch.backends.cudnn.allow_tf32 = False
    found = dict(rows={}, copies={}, picture=None, protocol=dict(tokens=cfg.tokens, seed=cfg.seed))
    token_rows = {}
    try:
        if cfg.tokens:
            token_rows = token_statistics(*open_tokens(cfg.tokens), cfg.seed)
        if cfg.real:
            found = compare(cfg)
    except (RuntimeError, TypeError, ValueError) as error:      # of a network, or memory is full
        reason = str(error).strip().split("\n")[-1]
        raise SystemExit(f"not measured: {reason} (short of memory? lower --batch)") from error
    found["rows"].update(token_rows)
    report(Path(cfg.out), **found)
    return Path(cfg.out)


# ------------------------------------------------------------------------------------------ The method ends here
# Below: loading networks, opening and reading the sides, tables, the protocol.

I3D_URLS = (
    "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt?dl=1",
    "https://huggingface.co/flateon/FVD-I3D-torchscript/resolve/"
    "1c2d61711c52571ad617a1063e6fa691b212e184/i3d_torchscript.pt",
)
I3D_SHA256 = "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"
GET_I3D = (f"get i3d_torchscript.pt (51,235,320 bytes, sha256 {I3D_SHA256}) from "
           + " or ".join(I3D_URLS))


def round_to_bytes(video):
    """Onto the levels of bytes, as every side is read. Shapes: (..., 3, R, R) in [-1, 1] -> the same."""
    return from_uint8(to_uint8(video)).to(video.device)


def to_bytes(video):
    """What StyleGAN-V's networks are fed. Shapes: (B, T, 3, R, R) in [-1, 1] -> (B, 3, T, R, R) uint8."""
    return torch.from_numpy(to_uint8(video)).permute(0, 4, 1, 2, 3).to(video.device)


def load_features(cfg, device):
    """The network of --features. Returns the name of its distance, the network and its sha256."""
    if cfg.features == "i3d":
        return "FVD", load_i3d(cfg.i3d, device), I3D_SHA256
    if cfg.features == "random":
        print("FD-random is not FVD: random convolutions rank damage to footage, but know no objects "
              "and no actions, and no published number compares with it")
        return "FD-random", random_features, "none: drawn from seed 0"
    net, sha256 = load_torchscript(cfg.features, device)

    def features(video):
        return torch.flatten(net(video.transpose(1, 2)), 1)

    return f"FD-{Path(cfg.features).stem}", features, sha256


def load_i3d(path="", device="cpu"):
    """The I3D of published FVDs: logits of Kinetics-400, averaged over time, as TorchScript.

    Shapes:  -> function: video (B, T, 3, R, R) in [-1, 1] -> (B, 400), for T >= 10
    Raises:  SystemExit where the file is missing and cannot be downloaded, or has another sha256
    Source:  choice (not said): called as StyleGAN-V does: bytes, brought to 224 x 224 inside
    """
    file = Path(path or Path(torch.hub.get_dir()) / "checkpoints" / "i3d_torchscript.pt")
    for url in I3D_URLS:
        if path or file.exists():
            break
        try:                        # to a temporary name, which is renamed when the hash fits
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), hash_prefix=I3D_SHA256)
        except (OSError, RuntimeError) as error:
            print(f"no I3D from {url}: {error}")
    if not file.exists():
        raise SystemExit(f"no I3D at {file}: {GET_I3D} and put it there, or give --i3d PATH, or "
                         "--features random, which is not FVD")
    net, _ = load_torchscript(file, device, I3D_SHA256)

    def features(video):
        return net(to_bytes(video), rescale=True, resize=True, return_features=True)

    return features


def load_torchscript(path, device, want=None):
    """A TorchScript network and its sha256, checked before it is opened: opening runs its code."""
    try:
        sha256 = file_hash(path)
        if want in (None, sha256):
            return torch.jit.load(path, map_location=device).eval(), sha256
    except (OSError, RuntimeError) as error:
        raise SystemExit(f"{path} is not there or no TorchScript, the format of --features, --i3d "
                         "and --c3d") from error
    raise SystemExit(f"{path} has sha256 {sha256}, so it was not opened: {GET_I3D}")


def check_i3d(meter):
    """Squared distance between features of black and of white clips: right network, right range?"""
    clips = torch.tensor([-1.0, 1.0], device=meter.device).view(2, 1, 1, 1, 1)
    black, white = meter.network(clips.expand(2, 30, 3, 64, 64))
    return (black - white).square().sum()


# ------------------------------------------------------------------------------------------ the two sides

class Side:
    """A dataset, and which of its clips are measured: up to n, one of each video, drawn by the seed.

    Place k is the k-th of the n clips drawn. For --novelty, place n + k is the same clip mirrored,
    and 2n + k with noise of 0.05, 32 dB.
    """

    def __init__(self, dataset, cfg):
        self.dataset = dataset
        self.cfg = cfg
        self.settings = getattr(dataset, "settings", {})
        rng = np.random.default_rng(cfg.seed)
        self.numbers = rng.permutation(len(dataset.labels))[:cfg.n]

    def __len__(self):
        return len(self.numbers)

    def read(self, places):
        """Clips on the levels of bytes. Shapes: (b,) -> (b, T, 3, R, R)."""
        clips = []
        for place in places:
            change, k = divmod(int(place), len(self))
            i = int(self.numbers[k])
            clip, _ = self.dataset[i, [self.cfg.seed, i]]
            if change == 1:
                clip = clip.flip(-1)
            if change == 2:
                rng = torch.Generator().manual_seed(i)
                clip = clip + 0.05 * torch.randn(clip.shape, generator=rng)
            clips.append(clip[:self.cfg.frames])
        return round_to_bytes(torch.stack(clips))

    def class_names(self):
        """The class of each clip drawn: sides are compared by name, where a number has one."""
        names = dict(enumerate(self.dataset.classes))
        return [names.get(k, str(k)) for k in self.dataset.labels[self.numbers]]

    def sources(self):
        """A number for each clip drawn, the same for a group (_gNN) of UCF-101, cut from one video."""
        names = self.numbers
        if getattr(self.dataset, "files", None):
            names = [re.sub(r"_c\d+\.\w+$", "", str(self.dataset.files[i])) for i in self.numbers]
        return torch.from_numpy(np.unique(names, return_inverse=True)[1])


def open_sides(cfg):
    """Both sides, and cfg with what their clips on disk say. SystemExit for what cannot be measured."""
    real = open_clips(cfg.real, ("original.npy", "samples.npy"))
    fake = open_clips(cfg.fake, ("samples.npy", "reconstruction.npy"))
    flags = cfg
    for side in (fake, real):
        if side is not None:
            cfg = like_clips(cfg, side, flags)
    cfg = fill_in(cfg, frames=16, stride=1, resolution=128)
    real = Side(real or open_videos(cfg.real, cfg.split, cfg), cfg)
    fake = Side(fake or open_videos(cfg.fake, "all", cfg), cfg)
    pair = real.settings.get("pair")
    if pair and pair == fake.settings.get("pair"):
        cfg = replace(cfg, paired=True)
    if cfg.lpips_net == "auto":
        cfg = replace(cfg, lpips_net="alex" if cfg.paired else "none")
    check_settings(cfg, real, fake)
    return real, fake, cfg


def open_clips(spec, names):
    """Clips on disk, given by the .npy or by the folder that sample.py wrote; None for other sides."""
    present = [Path(spec) / name for name in names if (Path(spec) / name).exists()]
    if spec.endswith(".npy"):
        present = [spec]
    if len(present) > 1:
        raise SystemExit(f"{spec} holds {present[0].name} and {present[1].name}: name one")
    if present:
        return Videos.open(present[0])


def like_clips(cfg, side, flags):
    """cfg filled in by clips on disk. SystemExit where flags or the other side ask for other clips."""
    _, frames, resolution, *_ = side.shape
    cfg = fill_in(cfg, frames=frames, stride=side.settings.get("stride", 1), resolution=resolution)
    longer = frames > cfg.frames and flags.frames < 0
    if frames < cfg.frames or longer or resolution != cfg.resolution:
        raise SystemExit(f"{side.path} has {frames} frames of {resolution} pixels, the flags or the "
                         f"other side say {cfg.frames} of {cfg.resolution}; --frames may take fewer")
    return cfg


def fill_in(cfg, **values):
    """cfg with values for those settings that are still open, -1."""
    unset = {key: value for key, value in values.items() if getattr(cfg, key) < 0}
    return replace(cfg, **unset)


def open_videos(spec, split, cfg, held_out=False):
    """Toy clips, or those of a folder of videos, never mirrored."""
    root = Path(spec.removeprefix("ucf:"))
    dataset = "toy"
    if spec != "toy":
        dataset = "folder"
        if not root.is_dir():
            raise SystemExit(f"{spec!r} is no folder of videos, nothing of sample.py's, and not toy")
        if cfg.stride != int(cfg.stride):
            raise SystemExit(f"no stride of {cfg.stride} in {spec}: choose with --stride")
    index = Path(cfg.out).parent / f"index-{root.resolve().name}"
    wanted = vars(cfg) | dict(dataset=dataset, data_root=root, split=split, flip=False, out=index)
    return build_dataset(SimpleNamespace(**wanted), held_out)


def check_settings(cfg, real, fake):
    """SystemExit, before any network is loaded, for what cannot be measured."""
    if min(len(real), len(fake)) < 4:
        raise SystemExit(f"{len(real)} real and {len(fake)} fake clips: 4 of each are the least")
    if cfg.paired and len(real.dataset.labels) != len(fake.dataset.labels):
        raise SystemExit(f"pairs need equally many clips, not {len(real)} and {len(fake)}")
    least = {"i3d": 10, "random": 3}.get(cfg.features, 2)
    window = cfg.action_similarity
    if cfg.frames < max(least, window * 3 // 2) or 0 < window < least:
        raise SystemExit(f"--frames {cfg.frames}: I3D needs 10, --features random 3, and "
                         "--action-similarity windows of as many, and 1.5 windows")


# ------------------------------------------------------------------------------------------ tables

def distance_rows(name, real, fake, seed):
    """The distance and how far to trust it. Shapes: real (n, d), fake (m, d) -> {name: (value, note)}."""
    n, d = real.shape
    m = len(fake)
    half = n // 2
    floor = frechet_distance(real[:half], real[half:])
    bias = floor * (1 / n + 1 / m) / (1 / half + 1 / (n - half))        # it goes with 1/n + 1/m
    if min(n, m) < 2 * d:
        print(f"warning: {min(n, m)} clips are less than 2 x {d} features: {name} is biased upward "
              f"by about {bias:.3g}")
    rng = torch.Generator().manual_seed(seed)
    again = []
    for _ in range(5):
        again.append(frechet_distance(real, fake[torch.randint(m, (m,), generator=rng)]))
    note = f"{n} real, {m} fake clips; bias near {bias:.3g} if unpaired"
    return {
        name: (frechet_distance(real, fake), note),
        f"{name} spread": (np.std(again, ddof=1), "deviation over 5 bootstraps of the fake side"),
        f"{name} floor": (floor, f"real against real, {half} against {n - half} other clips"),
    }


def clip_rows(role, found, cfg):
    """Means over one side. Returns {name: (value, note)}."""
    rows = {}
    if cfg.features == "i3d":
        score = inception_score(found["features"].softmax(1))
        rows[f"IS {role}"] = (score, "of I3D's 400 classes, one split")
    if cfg.c3d:
        score = inception_score(found["c3d"])
        rows[f"IS-C3D {role}"] = (score, "of C3D's classes, first 16 frames, one split")
    notes = {
        "flickering": "VBench's formula, 1 for a still",
        "fLPIPS": f"neighbouring frames, {cfg.lpips_net}",
        "action similarity": f"windows of {cfg.action_similarity} frames",
    }
    for name, note in notes.items():
        if name in found:
            rows[f"{name} {role}"] = (found[name].mean(), note)
    return rows


def look_for_copies(real, fake, of_real, of_fake, meter):
    """Tables {what: `novelty`}, and a picture of the closest pairs.

    The real side stands for what trained, mirrored too. The ends of the scale are clips that cannot
    be copies, held-out ones, and clips that are, training clips with noise.
    """
    n = len(real)
    of_mirrored = meter.measure(meter.of_clip, range(n, 2 * n), real)
    sets = {"generated": of_fake}
    if not isinstance(real.dataset, Videos):
        held_out = open_videos(meter.cfg.real, meter.cfg.split, meter.cfg, held_out=True)
        held_out = Side(held_out, meter.cfg)
        if len(held_out):
            few = range(len(held_out))[:256]
            sets["real, held out"] = meter.measure(meter.of_clip, few, held_out)
    sets["training, with noise"] = meter.measure(meter.of_clip, range(2 * n, 3 * n)[:256], real)
    video = real.sources().repeat(2)                                    # (2n,)
    table = {}
    nearest = {}
    for space in ("features", "pixels"):
        bank = torch.cat([of_real[space], of_mirrored[space]])          # (2n, k)
        for title, found in sets.items():
            first, second, place = nearest_two(found[space], bank, video)
            table[f"{space}: {title}"] = novelty(first, second)
            if found is of_fake:
                nearest[space] = (first / second, place)
    return table, show_closest(real, fake, nearest, meter.cfg.novelty)


def look_for_copied_tokens(fake, cfg):
    """The same among weight tokens, where sample.py kept those of the fake side and --tokens names what trained.

    Source:  choice (not said): differences are counted in widths of the posterior, whose draws are
             the copies; with their own video left out they are what cannot be copies, as held-out
             clips have no tokens in the cache
    """
    kept = getattr(fake.dataset, "tokens", None)
    if kept is None or not cfg.tokens:
        print("tokens are not compared: that takes --tokens, and samples with tokens beside them")
        return {}
    cache, video = open_tokens(cfg.tokens)
    if kept.shape[1:] != cache.shape[2:]:
        raise SystemExit(f"{cfg.tokens} has tokens {cache.shape[2:]}, the samples {kept.shape[1:]}: "
                         "name the cache that their model learned from")
    rows = np.random.default_rng(cfg.seed).permutation(len(cache))[:256]
    _, logvar, drawn = draw_tokens(cache, rows, cfg.seed)
    width = (logvar.mean(0) / 2).exp().numpy()                          # (N, d)
    video = torch.from_numpy(video)
    sets = {
        "generated": (kept[fake.numbers], None),
        "training, own video left out": (drawn.numpy(), video[rows]),
        "training, drawn anew": (drawn.numpy(), None),
    }
    table = {}
    for title, (tokens, own) in sets.items():
        first, second, _ = nearest_two(tokens, cache[:, 0], video, own, width)
        table[f"tokens: {title}"] = novelty(first, second)
    return table


def show_closest(real, fake, nearest, count):
    """Fake clips closest to a real one, beside their nearest in features, in pixels. -> (T, 3, H', W')."""
    ratio, _ = nearest["features"]
    chosen = ratio.argsort()[:count]                                    # (K,)
    names = fake.class_names()
    labels = [[names[i] for i in chosen]]
    clips = [fake.read(chosen)]
    for space, (ratio, place) in nearest.items():
        labels.append([f"{space} {x:.2f}" for x in ratio[chosen]])
        clips.append(real.read(place[chosen]))
    trios = torch.stack(clips, 1).flatten(0, 1)                         # (3K, T, 3, R, R)
    return tile(trios, 6, [label for trio in zip(*labels) for label in trio])


# ------------------------------------------------------------------------------------------ files

def open_tokens(path):
    """A token cache of nerv_dit.py: memory map (M, 2 or 3, N, d) and the video (M,) a row is from."""
    try:
        cache = np.load(path, mmap_mode="r")
        video = np.array(json.loads(Path(path).with_suffix(".json").read_text())["videos"])
        if cache.dtype != np.float16 or cache.ndim != 4 or cache.shape[1] not in (2, 3):
            raise ValueError(f"it holds {cache.dtype} {cache.shape}")
        if video.shape != cache.shape[:1] or video.min() < 0:
            raise ValueError("its .json does not name a video for each row")
    except Exception as error:                          # damaged files raise anything
        raise SystemExit(f"{path} is no token cache of nerv_dit.py: {error}") from error
    return cache, video


def protocol_of(real, fake, meter):
    """Everything that decides the numbers, {name: value}."""
    protocol = {key: value for key, value in vars(meter.cfg).items() if value != ""}
    protocol["resize_filter"] = "shorter side, bilinear, antialias; centre crop; bytes; never mirrored"
    protocol.update(device=meter.device, features_sha256=meter.sha256, torch=torch.__version__)
    for role, side in (("real", real), ("fake", fake)):
        protocol[f"{role}_clips"] = f"{len(side)} of {len(side.dataset.labels)}"
        protocol[f"{role}_labels"] = Counter(side.class_names())
        for key, value in side.settings.items():
            protocol[f"{role}_{key}"] = value
    unknown = protocol["fake_labels"].keys() - set(real.dataset.classes)
    if unknown:
        protocol["fake_labels_unknown_to_real"] = sorted(unknown)
    return protocol


def report(path, rows, copies, picture, protocol):
    """Print the tables and the protocol, write them, and the picture beside them.

    rows {name: (value, note)}, copies {what: `novelty`}, picture (T, 3, H, W) or None, protocol
    {name: value}
    """
    try:
        show(rows, copies, protocol)
    finally:                        # also where somebody closed the pipe: | head
        results = {name: dict(value=float(value), note=note) for name, (value, note) in rows.items()}
        written = dict(results=results, novelty=copies, protocol=protocol)
        write_file(path, json.dumps(written, indent=1).encode())
    if picture is not None:
        save_video(path.with_suffix(".gif"), picture)


def show(rows, copies, protocol):
    """Print the tables and the protocol."""
    for name, (value, note) in rows.items():
        print(f"{name:<24}{value:>12.5g}   {note}")
    if copies:
        print(f"{'new or remembered?':<40}{'nearest':>9}{'second':>9}{'d1/d2':>7}{'d1<d2/3':>9}")
    for name, row in copies.items():
        medians = f"{row['nearest']:>9.4g}{row['second']:>9.4g}{row['ratio']:>7.2f}"
        print(f"{name:<40}{medians}{row['share']:>9.1%}")
    for key, value in protocol.items():
        if isinstance(value, Counter):
            value = f"{len(value)} classes, {min(value.values())} to {max(value.values())} clips each"
        print(f"  {key:<20}{value}")


if __name__ == "__main__":
    main()
