"""FVD and its company, every number printed with the protocol behind it.

    python fvd.py --real UCF-101 --fake out/samples                 # FVD at 2048 clips a side
    python fvd.py --real out/rec --fake out/rec --lpips-net alex    # of sample.py --reconstruct: rFVD, PSNR
    python fvd.py --real UCF-101 --fake out/long --frames 128 --action-similarity 16    # Tables A9, A10
    python fvd.py --dataset k600 --real k600/val --fake out/k600    # features of 64 x 64 pixels
    python fvd.py --real toy --fake out/samples --features random   # offline: FD-random, which is not FVD
    python fvd.py --tokens out/vae/tokens-KEY.npy                   # is the latent Gaussian, dead, clustered?
    python fvd.py --real toy --fake out/samples --features random --n 16384 \\
        --novelty 8 --tokens out/vae/tokens-KEY.npy                 # are the samples new, or remembered?

Both sides go one way: clips, rounded to bytes -> network -> features (n, d), kept -> every statistic.
A folder that sample.py wrote is read through its clips on disk, samples.npy, never through its mp4.
A row of the results is (name, value, note).
Letters: B videos (B, T, 3, R, R) in [-1, 1], T frames, R = H = W pixels, n and m clips of a side,
         d features of a clip.
"""
import json
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from data import (Videos, alone, blur, build_dataset, file_hash, from_uint8, load_lpips, parse_config,
                  progress, psnr, save_video, tile, to_uint8, told, write_file)


@dataclass(frozen=True)
class Config:
    """Settings of a measurement: the paper's where it names them (Sec. 4.1: 2048 videos), else choice.

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
    c3d: str = ""                   # path of StyleGAN-V's c3d_ucf101.pt: adds C3D's Inception Score
    fvd_resolution: int = 0         # 0..: size of clips just before the features; 0 leaves them
    novelty: int = 0                # 0..64: new or remembered? and a picture of so many pairs
    lpips_net: str = "none"         # none|alex|vgg|squeeze: adds fLPIPS, and LPIPS of pairs
    action_similarity: int = 0      # 0..: frames of a window; cosine between a clip's windows
    tokens: str = ""                # cache of nerv_dit.py: statistics of the latent, and --novelty
    batch: int = 16                 # 1..: B, clips that go through a network at a time
    out: str = "out/fvd.json"       # results; a picture and the index of a folder go beside it
    seed: int = 0                   # 0..4294967295: fixes the draws, and toy clips (as in training)


PRESETS = {"k600": dict(fvd_resolution=64)}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# ------------------------------------------------------------------------------------------ distances

def frechet_distance(a, b):
    """Squared distance between Gaussians fitted to two sets of features.

    It is biased upward by about c (1/n + 1/m).

    Shapes:  a (n, d), b (m, d) -> float
    Raises:  RuntimeError for values that are not finite
    Source:  paper (Sec. 4.1), FVD of arXiv 1812.01717
             choice (not said): float64 and singular values; float32 and matrix roots miss by tenths
    """
    mean_a, root_a = mean_and_root(a)
    mean_b, root_b = mean_and_root(b)
    shift = (mean_a - mean_b).square().sum()
    spread = torch.cat([root_a, root_b]).square().sum()                 # trace of both covariances
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()               # trace sqrt(cov_a cov_b)
    return max(0.0, (shift + spread - 2 * cross).item())


def mean_and_root(x):
    """Mean of the rows, and R with R^T R = their covariance, which may be singular.

    Shapes:  (n, d) -> (d,), (min(n, d), d)
    """
    x = x.double()
    mean = x.mean(0)
    return mean, torch.linalg.qr(x - mean, mode="r").R / (len(x) - 1) ** 0.5


def inception_score(probabilities):
    """exp of the entropy of the average clip's classes, less the average entropy of a clip's.

    Shapes:  (n, k) -> float
    Source:  paper (Table A5), IS of arXiv 1606.03498
             choice (not said): one split, as a tenth of the clips scores too low
    """
    p = probabilities.double()
    return np.exp(entropy(p.mean(0)) - entropy(p) / len(p))


def ssim(a, b):
    """Structural similarity of each frame, 1 where equal.

    Shapes:  a and b (..., T, 3, H, W) in [-1, 1] -> (..., T)
    Source:  paper (Table A4), SSIM of Wang et al. 2004
             choice (not said): no padding, mean over red, green and blue
    """
    planes = torch.stack([a, b]).flatten(1, -3)[:, :, None]             # (2, n, 1, H, W)
    x, y = (planes.double() + 1) / 2                                    # in [0, 1]
    moments = torch.cat([x, y, x * x + y * y, x * y])
    mean_x, mean_y, both, cross = blur(moments, 1.5, 5).chunk(4)        # a window of 11 x 11
    product = mean_x * mean_y
    squares = mean_x ** 2 + mean_y ** 2
    light = (2 * product + 0.01 ** 2) / (squares + 0.01 ** 2)
    structure = (2 * (cross - product) + 0.03 ** 2) / (both - squares + 0.03 ** 2)
    return (light * structure).mean((1, 2, 3)).view(a.shape[:-2]).mean(-1)


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
            motion = kernel[::2]
            motion -= motion.mean(2, keepdim=True)
            motion *= 4
        kernel *= (2 / kernel[0].numel()) ** 0.5        # keeps the scale through a ReLU
        x = F.conv3d(x, kernel.to(x.device), stride=stride, padding=padding).relu()
    return (x.mean((2, 3, 4)) + 0.01).log()                             # (B, 400)


def action_similarity(video, features, window):
    """Mean cosine between the features of every two windows of a clip. Shapes: (B, T, 3, R, R) -> (B, 1).

    Raises:  ValueError where a clip has but one window
    Source:  paper (E.6, Table A10)
             departs (E.6 takes all windows, and C3D): ours overlap by half, as neighbours are nearly
             equal, and the features are those of --features, as the public C3D gives probabilities
    """
    windows = video.unfold(1, window, window // 2).unbind(1)
    w = len(windows)                                                    # (B, 3, R, R, window) each
    if w == 1:
        raise ValueError("--action-similarity takes clips of 1.5 windows or more")
    total = sum(F.normalize(features(part.movedim(-1, 1))) for part in windows)     # (B, d)
    cosines = total.square().sum(1, keepdim=True)                       # (B, 1), w ones among them
    return (cosines - w) / (w * (w - 1))


# ------------------------------------------------------------------------------------------ new or remembered?

def nearest_videos(x, bank, video, width=1.0):
    """How far each clip is from the three nearest training videos, nearest first.

    Mirrored or cut elsewhere, clips of one video resemble each other: a video is as near as its
    nearest clip.
    Shapes:  x (n, ...), bank (M, ...), video (M,) that a clip of the bank is from -> (n, 3)
    Units:   differences are counted in `width`
    Raises:  ValueError for fewer than 3 videos
    """
    names, video = np.unique(video, return_inverse=True)
    if len(names) < 3:
        raise ValueError("new or remembered? takes training clips of 3 videos or more")
    video = torch.from_numpy(video)
    x = (torch.as_tensor(x) / width).flatten(1)
    nearest = torch.full((len(x), len(names)), torch.inf)
    for rows in torch.arange(len(bank)).split(1024):                    # the bank may be a file
        part = (torch.as_tensor(bank[rows]) / width).flatten(1)
        index = video[rows].expand(len(x), -1)
        nearest.scatter_reduce_(1, index, torch.cdist(x, part), "amin")
    return nearest.topk(3, largest=False).values


def copy_rows(what, distance):
    """Share of copies and how near the others are, from `nearest_videos`. Returns rows.

    Source:  choice (not said): a copy has d1 < d2 / 3, as in arXiv 2310.02664. What a tokenizer blurs
             may miss its third, so d1 / d2 stands beside the share, to be read between the two ends
             of the scale: clips that cannot be copies, and training clips that were changed
    """
    first, second = distance[:, :2].T
    ratio = first / second.clamp(min=1e-12)
    return [
        (f"copies: {what}", (ratio < 1 / 3).double().mean(), "share with d1 < d2 / 3"),
        (f"d1 / d2: {what}", ratio.median(),
         f"medians of d1 {first.median():.4g} and d2 {second.median():.4g}"),
    ]


def copied_clips(real, fake, of_real, of_fake, ask, cfg):
    """Copies among features and among pixels. Returns rows, and a picture of the closest pairs.

    The real side stands for what trained, mirrored too.
    """
    few = replace(cfg, n=256)
    mirrored = measure(lambda video: ask(video.flip(-1)), real)
    # Training clips with noise of 0.05, which is 32 dB: copies that are not exact.
    noisy = measure(lambda x: ask(x + 0.05 * torch.randn_like(x)), Side(real.dataset, few))
    sets = {"generated": of_fake, "training, with noise": noisy}
    if not real.settings:                               # clips on disk have none held out
        held_out = Side(open_videos(cfg, cfg.real, cfg.split, held_out=True), few)
        if len(held_out):
            sets["real, held out"] = measure(ask, held_out)
    rows = []
    for space in ("pixels", "features"):
        bank = torch.cat([of_real[space], mirrored[space]])             # (2n, k)
        for title, found in sets.items():
            nearest = nearest_videos(found[space], bank, real.sources() * 2)
            rows += copy_rows(f"{space}, {title}", nearest)
    distance, place = torch.cdist(of_fake["features"], bank).min(1)     # the bank of features
    chosen = distance.argsort()[:cfg.novelty]
    pairs = torch.stack([fake.read(chosen), real.read(place[chosen] % len(real))], 1)
    return rows, tile(pairs.flatten(0, 1), 8, ["generated", "training"] * len(chosen))


def copied_tokens(fake, cfg):
    """Copies among weight tokens, where sample.py kept those of the fake side. Returns rows.

    Source:  choice (not said): differences are counted in widths of the posterior, whose draws are
             the copies; with the nearest video left out they are what cannot be copies, as held-out
             clips have no tokens in the cache
    """
    cache, video, _, logvar, drawn = open_tokens(cfg.tokens)
    kept = getattr(fake.dataset, "tokens", None)
    if kept is None or kept.shape[1:] != cache.shape[2:]:
        print("tokens are not compared: that takes samples with tokens beside them, and as "
              "--tokens the cache that their model learned from")
        return []
    width = (logvar.mean(0) / 2).exp()                                  # (N, d)
    generated = nearest_videos(kept[fake.numbers], cache[:, 0], video, width)
    anew = nearest_videos(drawn, cache[:, 0], video, width)
    return [
        *copy_rows("tokens, generated", generated),
        *copy_rows("tokens, training, drawn anew", anew),
        *copy_rows("tokens, training, nearest video left out", anew[:, 1:]),
    ]


# ------------------------------------------------------------------------------------------ weight tokens

def token_statistics(cfg):
    """Is the latent Gaussian, is a part of it dead, do clips of one video lie together? Returns rows.

    Source:  paper (Tables A11, A13)
             choice (not said): 2048 rows, all values of the tokens as stage 2 draws them; a dimension
             is dead where its mean varies by less than 0.01 over clips (arXiv 1509.00519)
             departs (A11 also crops at random in space): the cache holds what stage 2 learns from
    """
    cache, video, mean, _, z = open_tokens(cfg.tokens)
    standard = (z - z.mean()) / z.std()
    rows = [
        ("mean", z.mean(), f"of sampled tokens, {len(z)} of {len(cache)} clips"),
        ("std", z.std(), "the prior has 1"),
        ("skew", (standard ** 3).mean(), "a Gaussian has 0"),
        ("kurtosis", (standard ** 4).mean() - 3, "excess: a Gaussian has 0"),
        ("dead dims", (mean.var(0) < 0.01).float().mean(), "share whose mean varies by < 0.01"),
    ]
    some = torch.randperm(len(video))[:100]
    chosen = torch.isin(video, video[some])                             # (M,)
    names, source = video[chosen].unique(return_inverse=True)
    k = len(names)
    if len(source) > k > 1:                                             # several clips of a video
        tokens = torch.from_numpy(cache[chosen, 0]).float().flatten(1)
        purity, nmi = purity_and_nmi(kmeans(tokens, k), source)
        rows += [
            ("purity", purity, f"k-means of {len(source)} clips of {k} videos"),
            ("NMI", nmi, "of the same clusters, 1 where each is a video"),
        ]
    return rows


def kmeans(x, k):
    """Lloyd's algorithm. Shapes: x (n, d) -> (n,) cluster 0..k-1.

    Source:  choice (not said): every next centre is first the row farthest from those before, as
             random rows leave videos that lie apart in one cluster
    """
    chosen = [0]
    while len(chosen) < k:
        chosen.append(torch.cdist(x, x[chosen]).amin(1).argmax().item())
    centres = x[chosen]
    for _ in range(20):
        cluster = torch.cdist(x, centres).argmin(1)
        member = F.one_hot(cluster, k).float()                          # (n, k)
        centres = member.T @ x / member.sum(0).clamp(min=1)[:, None]
    return cluster


def purity_and_nmi(cluster, source):
    """Share of rows in their cluster's commonest source; mutual information over mean entropy.

    Shapes:  cluster (n,), source (n,) -> two floats
    """
    joint = (F.one_hot(cluster).T @ F.one_hot(source)).double() / len(source)
    entropies = entropy(joint.sum(0)) + entropy(joint.sum(1))
    return joint.amax(1).sum().item(), 2 - 2 * entropy(joint) / entropies


def entropy(p):
    """In nats, of probabilities of any shape."""
    return -torch.xlogy(p, p).sum().item()


# ------------------------------------------------------------------------------------------ the measurement

NOTES = {                           # of the rows that are means of what is asked, or C3D's IS
    "IS-C3D": "of C3D's classes, first 16 frames, one split",
    "flickering": "VBench's formula, 1 for a still",
    "fLPIPS": "neighbouring frames",
    "action similarity": "cosine between windows of a clip",
    "PSNR": "dB, mean over the frames of all pairs",
    "SSIM": "mean over the frames of all pairs",
    "LPIPS": "mean over the frames of all pairs",
}


@torch.no_grad()
def compare(cfg):
    """Everything that the flags ask for. Returns rows, the protocol, and a picture or None."""
    rows = []
    if cfg.tokens:
        rows += token_statistics(cfg)
        if not (cfg.real or cfg.fake):
            return rows, vars(cfg), None
    real, fake, cfg = open_sides(cfg)
    if cfg.novelty and cfg.tokens:
        rows += copied_tokens(fake, cfg)
    of_clip, of_pair = questions(cfg)
    of_real = measure(of_clip, real)
    of_fake = measure(of_clip, fake)
    name = "FVD" if cfg.features == "i3d" else f"FD-{Path(cfg.features).stem}"
    rows += distance_rows(name, of_real["features"], of_fake["features"])
    found = {"real": of_real, "fake": of_fake}
    pair = real.settings.get("pair")
    if pair and pair == fake.settings.get("pair"):
        found["pairs"] = measure(of_pair, real, fake)
    for role, values in found.items():
        for what, note in NOTES.items():
            if what in values:
                summary = inception_score if what == "IS-C3D" else torch.mean
                rows.append((f"{what} {role}", summary(values[what]), note))
    picture = None
    if cfg.novelty:
        copies, picture = copied_clips(real, fake, of_real, of_fake, of_clip, cfg)
        rows += copies
    protocol = dict(vars(cfg), device=DEVICE, torch=torch.__version__,
                    resize="shorter side, bilinear, antialias; centre crop; bytes; never mirrored")
    for role, side in dict(real=real, fake=fake).items():
        names = [side.dataset.classes[label] for label in side.dataset.labels[side.numbers]]
        about = dict(side.settings, clips=f"{len(side)} of {len(side.dataset)}",
                     labels=Counter(names))
        for key, value in about.items():
            protocol[f"{role}_{key}"] = value
    return rows, protocol, picture


def questions(cfg):
    """What is asked of a clip, and of a pair of clips.

    Shapes: -> two functions: one or two clips (B, T, 3, R, R) -> {name: (B, k)}
    """
    network = load_features(cfg)
    lpips = load_lpips(cfg.lpips_net, DEVICE)           # None for none
    if cfg.c3d:
        c3d = load_torchscript(cfg.c3d)

    def of_clip(video):
        seen = video                                                    # by the features
        if cfg.fvd_resolution:
            planes = F.interpolate(video.flatten(1, 2), cfg.fvd_resolution, mode="bilinear",
                                   antialias=True)                      # (B, 3 T, r, r)
            seen = planes.unflatten(1, (-1, 3))
        cells = F.adaptive_avg_pool3d(video.transpose(1, 2), (4, 8, 8))
        still = 1 - video.diff(dim=1).abs().mean((2, 3, 4)) / 2
        found = dict(features=network(seen), pixels=cells.flatten(1), flickering=still)
        if cfg.c3d:
            found["IS-C3D"] = c3d(to_bytes(video[:, :16]))
        if lpips:
            found["fLPIPS"] = lpips_distance(video[:, 1:], video[:, :-1], lpips)
        if cfg.action_similarity:
            found["action similarity"] = action_similarity(seen, network, cfg.action_similarity)
        return found

    def of_pair(a, b):
        found = dict(PSNR=psnr(a, b), SSIM=ssim(a, b))
        if lpips:
            found["LPIPS"] = lpips_distance(a, b, lpips)
        return found

    return of_clip, of_pair


def measure(ask, *sides):
    """Read the sides in step and keep what `ask` finds. Returns {name: (n, k)}."""
    n = len(sides[0])
    kept = {}
    for places in progress(torch.arange(n).split(sides[0].cfg.batch)):
        videos = [side.read(places).to(DEVICE) for side in sides]
        for name, value in ask(*videos).items():
            # In place: small tensors that stay between large ones that go make memory grow.
            if name not in kept:
                kept[name] = torch.empty(n, value.shape[1])
            kept[name][places] = value.cpu().float()
    return kept


def distance_rows(name, real, fake):
    """The distance and how far to trust it. Shapes: real (n, d), fake (m, d) -> rows."""
    n, d = real.shape
    m = len(fake)
    again = [frechet_distance(real, fake[torch.randint(m, (m,))]) for _ in range(5)]
    return [
        (name, frechet_distance(real, fake),
         f"{n} real, {m} fake clips; fewer than {2 * d} bias it upward"),
        (f"{name} spread", np.std(again, ddof=1), "deviation over 5 bootstraps of the fake side"),
        (f"{name} floor", frechet_distance(*real.tensor_split(2)),
         f"real against real, one half of the {n} clips against the other"),
    ]


def main(argv=None):
    """Command line: write the rows and their protocol to --out, print them. Returns that path."""
    alone("fvd.py")
    cfg = parse_config(Config, PRESETS, argv)
    path = Path(cfg.out)
    torch.backends.cudnn.allow_tf32 = False             # it moves the numbers from card to card
    torch.manual_seed(cfg.seed)
    try:
        rows, protocol, picture = compare(cfg)
    except (RuntimeError, TypeError, ValueError) as error:      # of a network, or memory is full
        reason = str(error).strip().split("\n")[-1]
        raise SystemExit(f"not measured: {reason} (I3D takes 10 frames or more, others 3; short of "
                         "memory? lower --batch)") from error
    results = {name: float(value) for name, value, _ in rows}
    text = json.dumps(dict(results=results, protocol=protocol), indent=1)
    write_file(path, text.encode())                     # first: somebody may close the pipe, | head
    if picture is not None:
        save_video(path.with_suffix(".gif"), picture)
    for name, value, note in rows:
        print(f"{name:<50}{value:>12.5g}   {note}")
    for key, value in protocol.items():
        print(f"  {key:<20}{str(value):.100}")
    return path


# ------------------------------------------------------------------------------------------ The method ends here
# Below: loading networks, opening and reading the sides and the token cache.

I3D_URLS = (
    "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt?dl=1",
    "https://huggingface.co/flateon/FVD-I3D-torchscript/resolve/"
    "1c2d61711c52571ad617a1063e6fa691b212e184/i3d_torchscript.pt",
)
I3D_SHA256 = "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"


def to_bytes(video):
    """What StyleGAN-V's networks are fed. Shapes: (B, T, 3, R, R) in [-1, 1] -> (B, 3, T, R, R) uint8."""
    return torch.from_numpy(to_uint8(video)).movedim(-1, 1).to(video.device)


def load_features(cfg):
    """The network of --features. Shapes: -> function: video (B, T, 3, R, R) in [-1, 1] -> (B, d)."""
    if cfg.features == "i3d":
        return load_i3d()
    if cfg.features == "random":
        print("FD-random is not FVD: random convolutions rank damage to footage, but know no "
              "objects and no actions, and no published number compares with it")
        return random_features
    net = load_torchscript(cfg.features)
    return lambda video: net(video.transpose(1, 2))


def load_i3d():
    """The I3D of published FVDs: logits of Kinetics-400, averaged over time, as TorchScript.

    Shapes:  -> function: video (B, T, 3, R, R) in [-1, 1] -> (B, 400), for T >= 10
    Raises:  SystemExit where the file is missing and cannot be downloaded, or has another sha256
    Source:  choice (not said): called as StyleGAN-V does: bytes, brought to 224 x 224 inside
    """
    file = Path(torch.hub.get_dir(), "checkpoints/i3d_torchscript.pt")
    for url in I3D_URLS:
        if file.exists():
            break
        try:                        # to a temporary name, which is renamed when the hash fits
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, file, hash_prefix=I3D_SHA256)
        except (OSError, RuntimeError) as error:
            print(f"no I3D from {url}: {error}")
    net = load_torchscript(file, I3D_SHA256)
    return lambda video: net(to_bytes(video), rescale=True, resize=True, return_features=True)


def load_torchscript(path, want=""):
    """A TorchScript network, its sha256 checked before it is opened: opening runs its code."""
    problem = "has another sha256"
    try:
        if want in ("", file_hash(path)):
            return torch.jit.load(path, map_location=DEVICE).eval()
    except (OSError, RuntimeError) as error:
        problem = f"is not there or no TorchScript ({type(error).__name__})"
    raise SystemExit(f"{path} {problem}, so it was not opened. --features random needs no file, but "
                     "is not FVD. I3D is i3d_torchscript.pt (51,235,320 bytes, sha256 "
                     f"{I3D_SHA256}) from {' or '.join(I3D_URLS)}, put there")


# ------------------------------------------------------------------------------------------ the two sides, and the token cache

class Side:
    """A dataset, and which of its clips are measured: up to n, one of each video, drawn by the seed."""

    def __init__(self, dataset, cfg):
        self.dataset = dataset
        self.cfg = cfg
        self.settings = getattr(dataset, "settings", {})
        self.numbers = np.random.default_rng(cfg.seed).permutation(len(dataset))[:cfg.n]

    def __len__(self):
        return len(self.numbers)

    def read(self, places):
        """The k-th of the clips drawn, on the levels of bytes. Shapes: b places -> (b, T, 3, R, R)."""
        clips = [self.dataset[i, [self.cfg.seed, i]][0] for i in self.numbers[places]]
        return from_uint8(to_uint8(torch.stack(clips)[:, :self.cfg.frames]))

    def sources(self):
        """What each clip drawn is from: clips of a group (_gNN) of UCF-101 are cut from one video."""
        files = getattr(self.dataset, "files", None) or range(len(self.dataset))
        return [re.sub(r"_c\d+\.\w+$", "", str(files[i])) for i in self.numbers]


def open_sides(cfg):
    """Both sides, and cfg with what their clips on disk say. SystemExit for what cannot be measured."""
    real = open_clips(cfg.real, "original.npy")
    fake = open_clips(cfg.fake, "reconstruction.npy")
    told = getattr(real or fake, "settings", {})        # where both are on disk the real side decides
    for name, usual in dict(frames=16, stride=1, resolution=128).items():
        if getattr(cfg, name) < 0:
            cfg = replace(cfg, **{name: told.get(name, usual)})
    for clips in (fake, real):
        if clips:
            _, T, R, *_ = clips.pixels.shape
            if T < cfg.frames or R != cfg.resolution:
                raise SystemExit(f"{clips.path} has {T} frames of {R} pixels, asked for are "
                                 f"{cfg.frames} of {cfg.resolution}; --frames may take fewer")
    real = Side(real or open_videos(cfg, cfg.real, cfg.split), cfg)
    fake = Side(fake or open_videos(cfg, cfg.fake), cfg)
    if min(len(real), len(fake)) < 4:
        raise SystemExit(f"{len(real)} real and {len(fake)} fake clips: 4 of each are the least")
    return real, fake, cfg


def open_clips(spec, of_a_pair):
    """Clips on disk, given by the .npy or by the folder that sample.py wrote; None for other sides."""
    paths = (Path(spec), Path(spec, "samples.npy"), Path(spec, of_a_pair))
    present = [path for path in paths if path.suffix == ".npy" and path.exists()]
    if len(present) > 1:
        raise SystemExit(f"{spec} holds {present[0].name} and {present[1].name}: name one")
    if present:
        return Videos.open(present[0])


def open_videos(cfg, spec, split="all", held_out=False):
    """Toy clips, or those of a folder of videos, never mirrored."""
    folder = spec and Path(spec).is_dir() and cfg.stride % 1 == 0
    if spec != "toy" and not folder:
        raise SystemExit(f"{spec!r} is no folder of videos, nothing of sample.py's, and not toy: "
                         "give --real and --fake, or --tokens (of a folder: with a whole --stride)")
    wanted = dict(dataset=spec, data_root=spec, split=split, flip=False,
                  stride=int(cfg.stride), out=Path(cfg.out).with_suffix(".index"))
    return build_dataset(SimpleNamespace(**vars(cfg) | wanted), held_out)


def open_tokens(path):
    """A token cache of nerv_dit.py, and mean, log-variance and a draw of the posterior of some rows.

    Shapes:  -> memory map (M, 2 or 3, N, d), the video (M,) a row is from, three of (2048, N, d) at most
    """
    with told(f"{path} is no token cache of nerv_dit.py"):
        cache = np.load(path, mmap_mode="r")
        video = json.loads(Path(path).with_suffix(".json").read_text())["videos"]
    rows = torch.randperm(len(cache))[:2048]
    mean, logvar = torch.from_numpy(cache[rows, :2]).float().unbind(1)
    drawn = mean + (logvar / 2).exp() * torch.randn_like(mean)
    return cache, torch.tensor(video), mean, logvar, drawn


if __name__ == "__main__":
    main()
