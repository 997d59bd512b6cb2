"""Videos in, videos out: built-in toy clips, UCF-101, Kinetics-600 or any folder of videos; and the command line.

    file or drawing -> T frames, `stride` apart -> shorter side to R -> centre crop -> (T, 3, R, R) in [-1, 1]

Letters: B videos, T frames, R = H = W pixels, M videos in a dataset.
Ranges:  a clip is float32 in [-1, 1], shape (T, 3, R, R); only files and `samples.npz` hold uint8 in 0..255.
A dataset is indexed by (video, seed): the seed alone decides which frames of the video, and whether it is mirrored.

    python data.py --dataset ucf --data-root UCF-101 --bench --workers 8        # what it finds, and how fast it loads

--bench prints clips per second of the process itself (0 workers), with the share of decoding, resizing and copying
clips into a batch, and then of the loader processes together.
"""
import argparse
import cProfile
import dataclasses
import inspect
import json
import os
import pstats
import re
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw                        # imageio brings it along
from av.video.reformatter import VideoReformatter
from tqdm import tqdm


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of this file run as a program; training has its own, of the same names but not the same defaults."""

    dataset: str = "toy"            # toy|ucf|k600|folder: the clips
    data_root: str = ""             # folder of videos, one sub-folder a class (not needed for toy)
    split: str = "all"              # all, train, test or a list of groups such as 1-19,23
    frames: int = 16                # T, frames per clip
    stride: int = 1                 # step in the file between frames of a clip; 0 spreads them over the whole file
    resolution: int = 128           # H = W in pixels
    flip: bool = True               # mirror half of the clips
    in_memory: bool = False         # keep every video that was read, whole and resized: small ones are decoded once
    bench: bool = False             # also measure how fast clips load
    workers: int = 2                # loader processes of the second row
    batch: int = 32                 # B, clips that are copied together
    clips: int = 512                # clips to load for each row
    out: str = "out/data"           # folder of index.json, the list of the videos
    seed: int = 0                   # fixes which clips


SUFFIXES = {".avi", ".mp4", ".mkv", ".webm", ".mov", ".gif"}
TREE = """    {root}/
        ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi        one folder a class, any depth, any of {suffixes}
        Archery/v_Archery_g01_c01.avi
    UCF-101 comes as UCF101.rar from https://www.crcv.ucf.edu/data/UCF101.php (unpack with `unrar x` or `bsdtar -xf`)"""


# ---------------------------------------------------------------------------------------------- command line

def parse_config(cls, presets, argv=None, dataset=None):
    """Turn a config dataclass into a command line: one flag a field, the comment on its line is the help.

    Authority: dataclass default < preset row picked by --dataset < explicit flag. `dataset` is the row used when
    the flag is absent. A comment that starts with `a|b|c:` allows those values only. A field without a comment is
    a KeyError on purpose: settings that nobody explained do not ship. Unknown flags and bad values exit with 2.
    """
    notes = dict(re.findall(r"^ +(\w+):[^#\n]*#\s*(.+)$", inspect.getsource(cls), re.M))
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset", default=dataset or getattr(cls, "dataset", None))
    dataset = first.parse_known_args(argv)[0].dataset
    doc = inspect.cleandoc(sys.modules[cls.__module__].__doc__).split("\n")[0]
    parser = argparse.ArgumentParser(allow_abbrev=False, description=doc)
    for f in dataclasses.fields(cls):
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type)
        values = re.match(r"([\w.]+(?:\|[\w.]+)+):", notes[f.name])
        if values:
            kind["choices"] = [f.type(v) for v in values[1].split("|")]
            kind["metavar"] = f.name.upper()
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, **kind,
                            help=notes[f.name].replace("%", "%%") + " (default: %(default)s)")
    if presets:
        parser.set_defaults(dataset=dataset, **presets.get(dataset, {}))
    return cls(**vars(parser.parse_args(argv)))


# ---------------------------------------------------------------------------------------------- toy clips

COLOURS = dict(red=(215, 65, 60), yellow=(220, 200, 60), green=(70, 190, 85),
               cyan=(70, 200, 205), blue=(75, 105, 225), magenta=(205, 85, 195), white=(220, 220, 220))
TOY_VIDEOS = 16384              # as many train as are held out
SHAPES, MOTIONS = ("ball", "ring", "bar", "pillar"), ("sliding", "pulsing")


def draw_toy(rng, label, frames, resolution):
    """One clip of a coloured shape that slides along a line, or pulses in place.

    Shapes:  -> (T, 3, R, R) float32 in [-1, 1]; class = 2 * shape + motion
    Source:  choice: eight classes that a person can name from eight frames of 32 x 32 pixels
    """
    shape, motion = SHAPES[label // 2], MOTIONS[label % 2]
    colour = np.array(list(COLOURS.values())[rng.integers(len(COLOURS))]) / 127.5 - 1
    ground = rng.uniform(-0.75, -0.35) + rng.uniform(-0.05, 0.05, 3)                # dark grey, slightly tinted
    r, time = rng.uniform(0.44, 0.56), np.linspace(-0.5, 0.5, frames)               # any T spans the same motion
    if motion == "pulsing":
        centre = np.broadcast_to(rng.uniform(0.6 * r - 0.6, 0.6 - 0.6 * r, 2), (frames, 2))         # (T, 2)
        beat = np.sin(2 * np.pi * (rng.uniform(0.8, 1.2) * time + rng.random()))    # (T,)
        r = r * (1 + 0.4 * beat)[:, None, None]                                     # (T, 1, 1)
    else:
        angle, reach = rng.uniform(0, 2 * np.pi), rng.uniform(0.45, 0.8)
        way = reach * np.array([np.cos(angle), np.sin(angle)])                      # (2,) first frame to last
        room = np.maximum(0.97 - r - abs(way) / 2, 0)                               # so that it stays in the picture
        centre = rng.uniform(-room, room) + np.outer(time, way)                     # (T, 2)
    grid = (np.arange(resolution) + 0.5) * 2 / resolution - 1
    x = grid[None, None, :] - centre[:, 0, None, None]                                              # (T, 1, R)
    y = centre[:, 1, None, None] - grid[None, :, None]                                              # (T, R, 1) up
    x, y = np.broadcast_arrays(x, y)                                                                # (T, R, R) each
    distance = {                                        # signed distance to the outline: negative inside
        "ball": np.hypot(x, y) - 0.8 * r,
        "ring": abs(np.hypot(x, y) - 0.76 * r) - 0.24 * r,
        "bar": np.maximum(abs(x) - r, abs(y) - 0.36 * r),
        "pillar": np.maximum(abs(x) - 0.36 * r, abs(y) - r),
    }[shape]
    cover = np.clip(0.5 - distance * resolution / 4, 0, 1)[:, None]                 # (T, 1, R, R); edges 2 pixels soft
    video = cover * colour[None, :, None, None] + (1 - cover) * ground[None, :, None, None]         # (T, 3, R, R)
    return torch.from_numpy(video.astype(np.float32))


class ToyVideos:
    """Moving shapes, drawn on the fly from the seed; the held-out ones come from another random stream.

    Shapes:  self[i, seed] -> (T, 3, R, R) float32 in [-1, 1], label int
    """

    classes = [f"{shape} {motion}" for shape in SHAPES for motion in MOTIONS]

    def __init__(self, cfg, held_out=False):
        self.cfg, self.stream, self.files = cfg, int(held_out), None           # no files to name
        self.labels = np.arange(TOY_VIDEOS) % len(self.classes)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, key):
        i, _ = key                                      # a toy video has no other frames to choose from
        rng = np.random.default_rng([self.cfg.seed, self.stream, i])
        return draw_toy(rng, self.labels[i], self.cfg.frames, self.cfg.resolution), int(self.labels[i])


# ---------------------------------------------------------------------------------- video files; skip at first

def decode(path, stamp=None):
    """The frames of a video file in order; with `stamp`, from the key frame that has this time stamp.

    Raises:  ValueError where frames change their size on the way; whatever the decoder raises for a damaged file
    """
    if not os.path.isfile(path):                        # opening a named pipe would wait for ever
        raise FileNotFoundError("not a regular file")
    # Names may hold colons and files may name addresses: both stay local files.
    with av.open(f"file:{path}", options={"protocol_whitelist": "file"}) as file:
        stream, first = file.streams.video[0], None
        stream.codec_context.options = {"max_pixels": str(2 ** 25)}                 # 8K; damaged headers claim anything
        stream.codec_context.thread_count = 1           # loader workers and the scan run side by side already
        if stamp is not None:
            file.seek(stamp, stream=stream)
        for frame in file.decode(stream):
            size, first = (frame.width, frame.height), first or (frame.width, frame.height)
            if size != first:
                raise ValueError(f"frames change from {first} to {size} pixels")
            if stamp is None or frame.pts == stamp:
                stamp = None                            # the key frame is found: all from here on
                yield frame


def survey(path):
    """Count the frames that really decode, as headers of damaged files lie; and list where decoding may begin.

    Returns (count, [[frame index, time stamp]]), key frames at least 8 apart. Raises what the decoder raises.
    """
    stamps, keys = [], [[0, None]]
    for k, frame in enumerate(decode(path)):
        stamps.append(frame.pts)
        if frame.key_frame and k >= keys[-1][0] + 8:    # nearer ones gain little and an index of them is long
            keys.append([k, frame.pts])
    if not stamps:
        raise ValueError("no frame decodes")
    rising = None not in stamps and all(a < b for a, b in zip(stamps, stamps[1:]))
    return len(stamps), keys if rising else keys[:1]    # B-frames in avi: stamps do not name frames


def count_frames(path):
    """Number of frames that really decode. Raises what the decoder raises."""
    return survey(path)[0]


def read_frames(path, indices, keys=((0, None),)):
    """Frames `indices` (ascending) of a video file, exactly; decoding starts at the last of `keys` (`survey`) before.

    Shapes:  -> (len(indices), H, W, 3) uint8, turned upright
    Raises:  ValueError when the file is unreadable or ends too early
    """
    problem, scaler = "it ends too early", VideoReformatter()       # PyAV's own keeps threads, which no fork survives
    for first, stamp in (max(key for key in keys if key[0] <= indices[0]), (0, None)):      # 0: where a seek failed
        try:
            frames = [frame for k, frame in zip(range(first, indices[-1] + 1), decode(path, stamp)) if k in indices]
            if len(frames) == len(indices):
                rgb = [scaler.reformat(frame, format="rgb24", threads=1).to_ndarray() for frame in frames]
                return np.stack([np.rot90(x, round(frame.rotation / 90)) for x, frame in zip(rgb, frames)])
        except Exception as error:                      # hostile files raise anything
            problem = repr(error)
    raise ValueError(f"cannot read frames {indices[0]}..{indices[-1]} of {str(path)!r}: {problem}")


def shrink(frames, resolution):
    """Shorter side to `resolution` (bilinear, antialiased, whole levels), centre crop.

    Shapes:  frames (T, H, W, 3) uint8 -> (T, 3, R, R) uint8
    Source:  choice: the paper names only the size; antialias as LARP, whose protocol the paper follows
    """
    x = torch.from_numpy(frames).permute(0, 3, 1, 2)    # (T, 3, H, W); resized as uint8: float takes 4 times as long
    h, w = x.shape[-2:]
    size = [max(resolution, round(side * resolution / min(h, w))) for side in (h, w)]
    x = F.interpolate(x, size, mode="bilinear", antialias=True)
    top, left = (size[0] - resolution) // 2, (size[1] - resolution) // 2
    return x[..., top:top + resolution, left:left + resolution]                     # (T, 3, R, R)


def to_clip(frames, resolution):
    """Shapes: frames (T, H, W, 3) uint8 0..255 -> (T, 3, R, R) float32 in [-1, 1]."""
    return (shrink(frames, resolution) / 127.5).sub_(1)


def read_clip(path, start, frames, stride, resolution, keys=((0, None),)):
    """T frames of a file from frame `start`, `stride` apart. Shapes: -> (T, 3, R, R) in [-1, 1]. Raises ValueError."""
    return to_clip(read_frames(path, range(start, start + frames * stride, stride), keys), resolution)


class VideoFolder:
    """Every video below a folder; class = the folder that holds it; each is scanned once into out/index.json.

    A video belongs to a *group* 1..25: the `_gNN_` of a UCF-101 name (clips of one group come from one source
    video, so a split by clip leaks), else a hash of its name. `split` names the groups that train; the rest is held
    out. Unreadable and short videos are skipped and counted; the index has the reason or the frame count. A folder of
    nothing else still counts as a class, so that a damaged copy numbers the classes like a whole one.

    Shapes:  self[i, seed] -> (T, 3, R, R) float32 in [-1, 1], label int
    Raises:  SystemExit with the expected tree where no video can be used
    """

    def __init__(self, cfg, held_out=False):
        root, self.cfg = Path(cfg.data_root), cfg
        tree = TREE.format(root=cfg.data_root or "DATA_ROOT", suffixes=" ".join(sorted(s[1:] for s in SUFFIXES)))
        if not cfg.data_root or not root.exists():
            raise SystemExit(f"--data-root {cfg.data_root!r} is not a folder; --dataset {cfg.dataset} expects\n{tree}")
        found = [root] if root.is_file() else sorted(p for p in root.rglob("*")
                                                     if p.suffix.lower() in SUFFIXES and not p.is_dir())
        root = root.parent if root.is_file() else root
        self.classes = sorted({p.parent.name for p in found})
        index = scan(found, root, Path(cfg.out) / "index.json")
        span, train = (cfg.frames - 1) * max(cfg.stride, 1) + 1, split_groups(cfg.split)
        good = [p for p in found if index[str(p.relative_to(root))]["frames"] >= span]
        if not good:
            raise SystemExit(f"--data-root {root} has no readable video of at least {span} frames "
                             f"({len(found)} video files seen); --dataset {cfg.dataset} expects\n{tree}")
        if len(found) > len(good) and not held_out:
            print(f"{root}: {len(found) - len(good)} of {len(found)} videos are unreadable or shorter than {span} "
                  f"frames and are skipped; {Path(cfg.out) / 'index.json'} names them")
        self.files = [p for p in good if (group_of(p.relative_to(root)) in train) != held_out]
        if not self.files and not held_out:
            raise SystemExit(f"--split {cfg.split} leaves no video of {root} for training; try --split all")
        self.index = [{k: index[str(p.relative_to(root))][k] for k in ("frames", "keys")} for p in self.files]
        self.labels = np.array([self.classes.index(p.parent.name) for p in self.files], dtype=np.int64)
        self.kept = {}                                  # with cfg.in_memory: video -> all its frames (n, 3, R, R) uint8

    def __len__(self):
        return len(self.files)

    def read(self, i, start, stride):
        """T frames of video i. Shapes: -> (T, 3, R, R) in [-1, 1]. Raises ValueError where it cannot be read."""
        path, known, c = self.files[i], self.index[i], self.cfg
        if not c.in_memory:
            return read_clip(path, start, c.frames, stride, c.resolution, known["keys"])
        if i not in self.kept:
            self.kept[i] = shrink(read_frames(path, range(known["frames"])), c.resolution).contiguous()
        return (self.kept[i][start:start + c.frames * stride:stride] / 127.5).sub_(1)

    def __getitem__(self, key):
        i, seed = key
        rng = np.random.default_rng(seed)
        for _ in range(10):                             # a file that broke since the scan must not end a long run
            cfg, n = self.cfg, self.index[i]["frames"]
            stride = cfg.stride or (n - 1) // max(cfg.frames - 1, 1)                # 0: evenly over the whole video
            start = rng.integers(n - (cfg.frames - 1) * stride)
            flip = cfg.flip and rng.random() < 0.5
            try:
                clip = self.read(i, int(start), stride)
                return clip.flip(-1) if flip else clip, int(self.labels[i])
            except ValueError as error:
                print(f"skipping: {error}", file=sys.stderr)
                i = int(rng.integers(len(self)))        # its label comes along, so labels cannot shift
        raise SystemExit("ten videos in a row could not be read; is the disk with --data-root still there?")


def scan(files, root, index_path):
    """Frame count of every file, from the index where path, size and mtime agree, else counted by decoding.

    Returns {relative path: {size, mtime, frames, keys, error}}; `frames` is 0 where the file cannot be read.
    """
    index = json.loads(index_path.read_text()) if index_path.exists() else {}

    def entry(path):
        key, found = str(path.relative_to(root)), dict(size=0, mtime=0, frames=0, keys=[], error="")
        try:
            found.update(size=path.stat().st_size, mtime=path.stat().st_mtime)
            old = index.get(key, {})
            if all(old.get(k) == found[k] for k in ("size", "mtime")) and old.get("keys"):     # not after an error
                return key, old
            found["frames"], found["keys"] = survey(path)
        except Exception as problem:                    # hostile files raise anything; each is named in the index
            found["error"] = f"{type(problem).__name__}: {problem}"
        return key, found

    def write(found):
        index_path.parent.mkdir(parents=True, exist_ok=True)
        part = index_path.with_suffix(f".{os.getpid()}")            # every process of a torchrun may write one
        part.write_text("{" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in found.items()) + "}")
        part.replace(index_path)

    fresh = {}
    with ThreadPoolExecutor() as pool:                  # the decoder releases the interpreter lock
        bar = tqdm(pool.map(entry, files), total=len(files), desc="scanning videos", unit="file", leave=False)
        for key, found in bar:
            fresh[key] = found
            if len(fresh) % 5000 == 0 and {**index, **fresh} != index:
                write({**index, **fresh})               # a scan that is stopped after hours goes on from here
    if {**index, **fresh} != index:
        write({**index, **fresh})                       # what it knows of another folder stays
    return fresh


# ---------------------------------------------------------------------------------------------- which clips train

def split_groups(split):
    """The groups 1..25 that train: all | train (8-25) | test (1-7), as UCF-101's split 1, or a list like 1-19,23."""
    named = {"all": "1-25", "train": "8-25", "test": "1-7"}.get(split, split)
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", named):
        raise SystemExit(f"--split {split} is not all, train, test or a list of groups such as 1-19,23")
    parts = [[int(n) for n in part.split("-")] for part in named.split(",")]
    return {g for part in parts for g in range(part[0], part[-1] + 1)}


def group_of(path):
    """Group 1..25 of a video: from its UCF-101 name, else a hash of its path below the root."""
    named = re.search(r"_g(\d\d)_c\d\d", path.name)
    return int(named[1]) if named else 1 + zlib.crc32(os.fsencode(path)) % 25


def build_dataset(cfg, held_out=False):
    """The training clips of `cfg.dataset`, or those kept out of training (may be empty: --split all)."""
    return (ToyVideos if cfg.dataset == "toy" else VideoFolder)(cfg, held_out)


# ---------------------------------------------------------------------------------------------- what tasks ask of clips

def condition_video(video, kind, given=5):
    """The clip that a conditional generator is shown, as long as the one it has to make.

    Shapes:  video (..., T, 3, R, R) -> the same; kind frames|image|edge
    Source:  paper Sec. 4.3: the first 5 frames, then the 5th repeated. Image: the first frame repeated, edge: Sobel
             magnitude of every frame (choice: E.7 does not say how they are made)
    """
    if kind == "edge":
        grey = video.mean(-3, keepdim=True)                                         # (..., T, 1, R, R)
        flat = F.pad(grey.reshape(-1, 1, *grey.shape[-2:]), (1, 1, 1, 1), mode="replicate")
        sobel = torch.tensor([[1., 2, 1], [0, 0, 0], [-1, -2, -1]], device=video.device)
        edges = F.conv2d(flat, torch.stack([sobel, sobel.T])[:, None])              # (.. * T, 2, R, R)
        edges = edges.square().sum(1, keepdim=True).sqrt() / 2 - 1                  # 0 edge is black
        return edges.clamp(-1, 1).reshape(grey.shape).expand_as(video).contiguous()
    shown = min(1 if kind == "image" else given, video.shape[-4])
    index = torch.arange(video.shape[-4]).clamp(max=shown - 1)
    return video[..., index, :, :, :]


def degrade(video, kind):
    """A damaged copy of a clip, for restoration: the encoder sees this and is asked for the clean one.

    Shapes:  video (..., T, 3, R, R) in [-1, 1] -> the same; kind none|downsample|blur|inpaint
    Source:  NeRV-Enc A.3. Choice: the appendix gives no strengths; these bring real clips at 256 x 256 near the input
             PSNR of its Table 8: R / 22 pixels a side, a Gaussian of R / 40, every seventh cell of an 8 x 8 grid
    """
    R, flat = video.shape[-1], video.flatten(0, -4)                                 # (n, 3, R, R)
    if kind == "downsample":
        small = F.interpolate(flat, max(R // 22, 1), mode="bilinear", antialias=True)
        flat = F.interpolate(small, R, mode="bilinear")
    elif kind == "blur":
        reach = max(R // 13, 1)
        tap = torch.exp(-(torch.arange(-reach, reach + 1, device=video.device) * 40 / R) ** 2 / 2)
        tap = (tap / tap.sum()).expand(3, 1, 1, -1)                                 # (3, 1, 1, taps)
        flat = F.pad(flat, [reach] * 4, mode="replicate")
        flat = F.conv2d(F.conv2d(flat, tap, groups=3), tap.transpose(2, 3), groups=3)
    elif kind == "inpaint":
        cell = torch.arange(R, device=video.device) * 8 // R
        hidden = (cell[:, None] * 2 + cell) % 7 == 0                                # (R, R): a knight's move apart
        flat = flat.masked_fill(hidden, 0.0)
    return flat.view_as(video)


def load_lpips(name, device):
    """LPIPS (arXiv 1801.03924), frozen; the loss of stage 1 and a measurement of fvd.py. SystemExit without weights."""
    import lpips                                        # takes seconds, and most runs do not need it
    try:
        return lpips.LPIPS(net=name, verbose=False).to(device).eval().requires_grad_(False)
    except (OSError, RuntimeError) as error:
        raise SystemExit(f"no {name} weights for LPIPS ({error}): put torchvision's file into "
                         f"{torch.hub.get_dir()}/checkpoints, or choose another --lpips-net, or do without it (stage "
                         "1: --lpips-weight 0; fvd.py: --lpips-net none)") from error


# ---------------------------------------------------------------------------------------------- pictures

def to_uint8(video):
    """Pixels [-1, 1] to uint8 by rounding. Shapes: (..., 3, H, W) float -> (..., H, W, 3) numpy uint8."""
    return ((video.movedim(-3, -1).float() + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy()


def tile(videos, columns, labels=()):
    """Videos side by side on white, each below its label; small ones are enlarged by whole pixels to about 96.

    Shapes:  videos (n, T, 3, H, W) in [-1, 1], labels n strings or none -> (T, 3, H', W')
    """
    scale = max(1, 96 // videos.shape[-1])
    videos = videos.cpu().repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    n, T, _, H, W = videos.shape
    text, border = 13 if labels else 0, 2
    h, w = H + text + border, W + border                                            # of a cell
    sheet = torch.ones(T, 3, -(-n // columns) * h + border, columns * w + border)
    for i, video in enumerate(videos):
        top, left = border + i // columns * h, border + i % columns * w
        sheet[..., top + text:top + text + H, left:left + W] = video
        if labels:
            strip = Image.new("L", (W, text), 255)
            ImageDraw.Draw(strip).text((1, 0), labels[i], fill=0)
            sheet[..., top:top + text, left:left + W] = torch.from_numpy(np.array(strip)) / 127.5 - 1
    return sheet


def save_video(path, video, fps=8):
    """Write one video as mp4, gif or png, by the suffix; a png is a contact sheet, time from left to right.

    Small frames are enlarged by whole pixels to about 256, as nobody can look at 32 x 32.
    Shapes:  video (T, 3, H, W) in [-1, 1]
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png" and len(video) > 1:
        video = tile(video[None].transpose(0, 1), len(video))                       # (1, 3, H', W')
    scale = max(1, 256 // max(video.shape[-2:]))
    frames = to_uint8(video).repeat(scale, 1).repeat(scale, 2)                      # (T, H, W, 3)
    if path.suffix == ".png":
        blob = iio.imwrite("<bytes>", frames[0], extension=".png")
    elif path.suffix == ".gif":
        blob = iio.imwrite("<bytes>", frames, extension=".gif", duration=1000 / fps, loop=0)
    else:
        frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
        blob = iio.imwrite("<bytes>", frames, extension=".mp4", plugin="pyav", codec="libx264", fps=fps,
                           in_pixel_format="rgb24")
    path.write_bytes(blob)                              # at once: a full disk is one error, here


# ---------------------------------------------------------------------------------------------- how fast clips load

def main(argv=None):
    """Command line: print what the data set holds and, with --bench, how fast it loads: {workers: clips a second}."""
    cfg = parse_config(Config, {}, argv)
    torch.set_num_threads(1)                            # as in a loader process
    dataset = build_dataset(cfg)
    print(f"{len(dataset)} videos of {len(dataset.classes)} classes; clips of {cfg.frames} x {cfg.resolution}^2")
    if not cfg.bench:
        return {}
    videos = np.random.default_rng(cfg.seed).integers(len(dataset), size=cfg.clips)
    keys = [(int(i), seed) for seed, i in enumerate(videos)]
    batches = [keys[k:k + cfg.batch] for k in range(0, cfg.clips, cfg.batch)]
    rates, profile = {}, cProfile.Profile()
    for workers in sorted({0, cfg.workers}):
        loader = torch.utils.data.DataLoader(dataset, batch_sampler=batches, num_workers=workers,
                                             pin_memory=torch.cuda.is_available(), persistent_workers=workers > 0)
        for _ in loader:                                # starts the processes and fills the disk cache
            pass
        start = time.perf_counter()
        profile.runcall(lambda: [None for _ in loader])
        rates[workers] = cfg.clips / (time.perf_counter() - start)
        took = {name: row[3] * 1e3 / cfg.clips for (_, _, name), row in pstats.Stats(profile).stats.items()}
        parts = dict(draw="draw_toy", decode="read_frames", resize="to_clip", copy="default_collate")
        print(f"{workers} workers{rates[workers]:10.1f} clips/s   " + (
            f"{rates[workers] / workers:.1f} each" if workers else "   ".join(
                f"{part} {took[name]:.2f} ms = {took[name] * rates[0] / 10:.0f}%"
                for part, name in parts.items() if name in took)))
    return rates


if __name__ == "__main__":
    main()
