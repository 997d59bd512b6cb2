"""Videos in, videos out: toy clips that are drawn, UCF-101, Kinetics-600 or any folder; and clips kept for measuring.

    file or drawing -> T frames, `stride` apart -> shorter side to R -> centre crop -> (T, 3, R, R) in [-1, 1]

Letters: B videos, T frames, R = H = W pixels, M videos in a dataset.
Ranges:  a clip is float32 in [-1, 1], shape (T, 3, R, R); uint8 in 0..255 only on disk and in `ClipsInMemory`.
A dataset is indexed by (video, seed): the seed alone decides which frames of the video, and whether they are mirrored.

    python data.py --dataset folder --data-root VIDEOS          # what training would find there, and what it leaves out
"""
import argparse
import collections
import contextlib
import dataclasses
import functools
import hashlib
import html
import inspect
import io
import json
import math
import os
import re
import sys
import threading
import unicodedata
import urllib.parse
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from av.video.reformatter import VideoReformatter
from tqdm import tqdm

try:
    import fcntl                    # locks files; not on Windows
except ImportError:
    fcntl = None


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of this file run as a program. Training has its own, of the same names but other defaults."""

    dataset: str = "toy"            # toy|ucf|k600|folder: the clips
    data_root: str = ""             # folder of videos, one sub-folder a class (not needed for toy)
    split: str = "all"              # all, train, test or a list of groups such as 1-19,23
    frames: int = 16                # 1..: T, frames of a clip
    stride: int = 1                 # 0..: step in the file between frames; 0 spreads them over the whole video
    resolution: int = 128           # 1..: R, height and width in pixels
    flip: bool = True               # mirror half of the clips
    out: str = "out/data"           # folder of index.json, the list of the videos
    seed: int = 0                   # 0..4294967295: fixes which toy clips


# ------------------------------------------------------------------------------------------ toy clips

COLOURS = {
    "red": (215, 65, 60), "yellow": (220, 200, 60), "green": (70, 190, 85), "cyan": (70, 200, 205),
    "blue": (75, 105, 225), "magenta": (205, 85, 195), "white": (220, 220, 220),
}
SHAPES = ("ball", "ring", "bar", "pillar")
MOTIONS = ("sliding", "pulsing")
TOY_VIDEOS = 16384                  # as many train as are held out


def draw_toy(rng, label, frames, resolution):
    """One clip of a coloured shape that slides along a line, or pulses in place.

    Shapes:  -> (T, 3, R, R) float32 in [-1, 1]; label = 2 * shape + motion
    Source:  choice: eight classes that a person can name from eight frames of 32 x 32 pixels
    """
    shape = SHAPES[label // 2]
    motion = MOTIONS[label % 2]
    colour = np.array(list(COLOURS.values())[rng.integers(len(COLOURS))]) / 127.5 - 1
    ground = rng.uniform(-0.75, -0.35) + rng.uniform(-0.05, 0.05, 3)    # dark grey, slightly tinted
    r = rng.uniform(0.44, 0.56)
    time = np.linspace(-0.5, 0.5, frames)                               # any T spans the same motion
    if motion == "pulsing":
        centre = rng.uniform(0.6 * r - 0.6, 0.6 - 0.6 * r, 2)
        centre = np.broadcast_to(centre, (frames, 2))                               # (T, 2)
        beat = np.sin(2 * np.pi * (rng.uniform(0.8, 1.2) * time + rng.random()))    # (T,)
        r = r * (1 + 0.4 * beat)[:, None, None]                                     # (T, 1, 1)
    else:
        angle = rng.uniform(0, 2 * np.pi)
        reach = rng.uniform(0.45, 0.8)
        way = reach * np.array([np.cos(angle), np.sin(angle)])          # (2,) first frame to last
        room = np.maximum(0.97 - r - abs(way) / 2, 0)                   # it stays in the picture
        centre = rng.uniform(-room, room) + np.outer(time, way)                     # (T, 2)
    grid = (np.arange(resolution) + 0.5) * 2 / resolution - 1                       # (R,)
    x = grid[None, None, :] - centre[:, 0, None, None]                              # (T, 1, R)
    y = centre[:, 1, None, None] - grid[None, :, None]                              # (T, R, 1), up
    x, y = np.broadcast_arrays(x, y)                                                # (T, R, R) each
    if shape == "ball":             # signed distance to the outline: negative inside
        distance = np.hypot(x, y) - 0.8 * r
    elif shape == "ring":
        distance = abs(np.hypot(x, y) - 0.76 * r) - 0.24 * r
    elif shape == "bar":
        distance = np.maximum(abs(x) - r, abs(y) - 0.36 * r)
    else:
        distance = np.maximum(abs(x) - 0.36 * r, abs(y) - r)
    cover = np.clip(0.5 - distance * resolution / 4, 0, 1)[:, None]     # (T, 1, R, R); soft edges
    video = cover * colour[None, :, None, None] + (1 - cover) * ground[None, :, None, None]
    return torch.from_numpy(video.astype(np.float32))                               # (T, 3, R, R)


class ToyVideos:
    """Moving shapes, drawn on the fly; the held-out ones come from another random stream.

    Shapes:  self[i, seed] -> (T, 3, R, R) float32 in [-1, 1], label int
    """

    classes = [f"{shape} {motion}" for shape in SHAPES for motion in MOTIONS]
    files = None                    # no files to name

    def __init__(self, cfg, held_out=False):
        self.cfg = cfg
        self.stream = int(held_out)
        self.labels = np.arange(TOY_VIDEOS) % len(self.classes)
        self.lengths = np.full(TOY_VIDEOS, cfg.frames)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, key):
        i, _ = key                  # a toy video has no other frames to choose from
        rng = np.random.default_rng([self.cfg.seed, self.stream, i])
        clip = draw_toy(rng, self.labels[i], self.cfg.frames, self.cfg.resolution)
        return clip, int(self.labels[i])

    def draws(self, i, seed):
        """As `VideoFolder.draws`."""
        yield i, 0, 1, False

    def whole(self, i, stop):
        """As `VideoFolder.whole`."""
        return torch.from_numpy(to_uint8(self[i, 0][0]))


# ------------------------------------------------------------------------------------------ videos of a folder

class VideoFolder:
    """The videos below a folder; the class of a video is the name of the folder that holds it.

    A video belongs to a *group* 1..25: the `_gNN_` of a UCF-101 name (clips of one group are cut from
    one source video, so a split by clip leaks), else a hash of its name. `split` names the groups that
    train, the rest is held out. A class exists where a clip of it can train, and held-out videos
    are numbered by the same classes. Whatever is left out is counted and named in one line.

    Shapes:  self[i, seed] -> (T, 3, R, R) float32 in [-1, 1], label int
    Raises:  SystemExit, with the expected tree where no video can be used
    """

    def __init__(self, cfg, held_out=False):
        self.cfg = cfg
        self.labels = []
        groups = split_groups(cfg.split)
        root, found, left_out = find_videos(cfg)
        index_path = Path(cfg.out) / "index.json"
        index = scan(found, root, index_path)
        span = (cfg.frames - 1) * max(cfg.stride, 1) + 1
        usable = [path for path in found if index[path]["frames"] >= span]
        if not usable:
            raise SystemExit(f"--data-root {root} has no readable video of at least {span} frames "
                             f"({len(found)} video files seen); {TREE}")
        train = [path for path in usable if group_of(path, root) in groups]
        if not train and not held_out:
            raise SystemExit(f"--split {cfg.split} leaves no video of {root} for training; "
                             "try --split all")
        self.classes = sorted({class_of(path) for path in train})
        others = set(usable) - set(train)
        self.files = train
        if held_out:
            self.files = [p for p in usable if p in others and class_of(p) in self.classes]
        else:
            why = f"unreadable or shorter than {span} frames, see {index_path}"
            left_out[why] = [path.name for path in found if path not in usable]
            why = "of a class without a clip that trains"
            left_out[why] = [p.name for p in others if class_of(p) not in self.classes]
            report(root, left_out)
        self.labels = np.array([self.classes.index(class_of(p)) for p in self.files], dtype=np.int64)
        self.lengths = np.array([index[path]["frames"] for path in self.files], dtype=np.int64)
        self.keys = [index[path]["keys"] for path in self.files]

    def __len__(self):
        return len(self.files)

    def __getitem__(self, key):
        for i, start, stride, mirrored in self.draws(*key):
            try:
                clip = read_clip(self.files[i], start, self.cfg.frames, stride,
                                 self.cfg.resolution, self.keys[i])
            except ValueError as error:     # a file that broke since the scan must not end a long run
                print(f"skipping: {error}", file=sys.stderr)
                problem = error
                continue
            if mirrored:
                clip = clip.flip(-1)
            return clip, int(self.labels[i])        # the label comes along, so labels cannot shift
        raise SystemExit(f"ten videos in a row could not be read; the last: {problem}")

    def draws(self, i, seed):
        """What (video, seed) stands for: video, first frame, stride, mirrored; then nine substitutes."""
        rng = np.random.default_rng(seed)
        for _ in range(10):
            steps = self.cfg.frames - 1
            stride = self.cfg.stride or int(self.lengths[i] - 1) // max(steps, 1)
            start = int(rng.integers(self.lengths[i] - steps * stride))
            mirrored = self.cfg.flip and rng.random() < 0.5
            yield i, start, stride, mirrored
            i = int(rng.integers(len(self)))

    def whole(self, i, stop):
        """Every frame of video i. Shapes: -> (n, R, R, 3) uint8. Raises: ValueError."""
        return read_frames(self.files[i], range(self.lengths[i]), self.cfg.resolution, stop=stop)


def build_dataset(cfg, held_out=False):
    """The training clips of `cfg.dataset`, or those kept out of training (none with --split all)."""
    if cfg.dataset == "toy":
        return ToyVideos(cfg, held_out)
    return VideoFolder(cfg, held_out)


def read_clip(path, start, frames, stride, resolution, keys=((0, None),)):
    """T frames of a file from frame `start`, `stride` apart. `keys`: where decoding may begin.

    Shapes:  -> (T, 3, R, R) in [-1, 1]
    Raises:  ValueError where they cannot be read
    """
    indices = range(start, start + frames * stride, stride)
    return from_uint8(read_frames(path, indices, resolution, keys))


class ClipsInMemory:
    """A dataset whose videos are decoded once and kept, small and as bytes, on the training device.

    Shapes:  self.batch(B keys) -> (B, T, 3, R, R) float32 on the device, labels (B,) int64 on the CPU;
             the clips that dataset[video, seed] gives, toy clips rounded to bytes
    Raises:  SystemExit in one line where memory is short
    """

    def __init__(self, dataset, device):
        cfg = dataset.cfg
        self.dataset = dataset
        self.device = device
        self.first = np.cumsum(dataset.lengths) - dataset.lengths       # row of each video's frame 0
        shape = (int(dataset.lengths.sum()), cfg.resolution, cfg.resolution, 3)
        need = math.prod(shape) / 1e9
        room = free_memory(device) / 1e9
        told = f"{len(dataset)} videos, {shape[0]} frames: {need:.2f} GB in memory ({device})"
        if need > 0.8 * room:
            raise SystemExit(f"{told}, of {room:.2f} GB free; give --no-in-memory or fewer videos")
        print(told)
        self.pixels = torch.empty(shape, dtype=torch.uint8, device=device)
        videos = range(len(dataset))
        self.readable = list(in_threads(self.load, videos, desc="decoding videos", unit="video"))

    def load(self, i, stop):
        """Decode video i into its place. False where it cannot be read."""
        first = self.first[i]
        try:
            self.pixels[first:first + self.dataset.lengths[i]] = self.dataset.whole(i, stop)
        except ValueError as error:
            print(f"skipping: {error}", file=sys.stderr)
            return False
        return True

    def batch(self, keys):
        """The clips of B (video, seed) keys, indexed, mirrored and scaled on the device."""
        rows = []
        labels = []
        flips = []
        for key in keys:
            draws = (draw for draw in self.dataset.draws(*key) if self.readable[draw[0]])
            i, start, stride, mirrored = next(draws, (None, 0, 0, 0))
            if i is None:
                raise SystemExit("ten videos in a row could not be read when memory was filled")
            rows.append(self.first[i] + start + stride * np.arange(self.dataset.cfg.frames))
            labels.append(int(self.dataset.labels[i]))
            flips.append(bool(mirrored))
        rows = torch.from_numpy(np.stack(rows)).to(self.device)                     # (B, T)
        video = from_uint8(self.pixels[rows])                                       # (B, T, 3, R, R)
        flips = torch.tensor(flips, device=self.device)[:, None, None, None, None]
        return torch.where(flips, video.flip(-1), video), torch.tensor(labels)


# ------------------------------------------------------------------------------------------ what tasks ask of clips

def condition_video(video, kind, given=5):
    """The clip that a conditional generator is shown, as long as the one it has to make.

    Shapes:  video (..., T, 3, R, R) -> the same; kind frames|image|edge
    Source:  paper (Sec. 4.3): the first 5 frames, then the 5th repeated
             choice (E.7 does not say how they are made): image: the first frame repeated, edge: Sobel
             magnitude of every frame
    """
    if kind == "edge":
        grey = video.mean(-3, keepdim=True)                                         # (..., T, 1, R, R)
        flat = grey.reshape(-1, 1, *grey.shape[-2:])
        flat = F.pad(flat, (1, 1, 1, 1), mode="replicate")
        sobel = torch.tensor([[1., 2, 1], [0, 0, 0], [-1, -2, -1]], device=video.device)
        edges = F.conv2d(flat, torch.stack([sobel, sobel.T])[:, None])              # (.. * T, 2, R, R)
        edges = edges.square().sum(1, keepdim=True).sqrt() / 2 - 1                  # no edge is black
        return edges.clamp(-1, 1).reshape(grey.shape).expand_as(video).contiguous()
    T = video.shape[-4]
    if kind == "image":
        given = 1
    index = torch.arange(T).clamp(max=min(given, T) - 1)
    return video[..., index, :, :, :]


def degrade(video, kind):
    """A damaged copy of a clip, for restoration: the encoder sees this and is asked for the clean one.

    Shapes:  video (..., T, 3, R, R) in [-1, 1] -> the same; kind none|downsample|blur|inpaint
    Source:  paper (NeRV-Enc A.3): the three kinds
             choice (no strengths are given): these bring real clips at 256 x 256 near the input PSNR of
             its Table 8: R / 22 pixels a side, a Gaussian of R / 40, every seventh cell of an 8 x 8 grid
    """
    R = video.shape[-1]
    flat = video.flatten(0, -4)                                                     # (n, 3, R, R)
    if kind == "downsample":
        small = F.interpolate(flat, max(R // 22, 1), mode="bilinear", antialias=True)
        flat = F.interpolate(small, R, mode="bilinear")
    elif kind == "blur":
        reach = max(R // 13, 1)
        offset = torch.arange(-reach, reach + 1, device=video.device)
        tap = torch.exp(-(offset * 40 / R) ** 2 / 2)
        tap = (tap / tap.sum()).expand(3, 1, 1, -1)                                 # (3, 1, 1, taps)
        flat = F.pad(flat, [reach] * 4, mode="replicate")
        flat = F.conv2d(flat, tap, groups=3)
        flat = F.conv2d(flat, tap.transpose(2, 3), groups=3)
    elif kind == "inpaint":
        cell = torch.arange(R, device=video.device) * 8 // R
        hidden = (cell[:, None] * 2 + cell) % 7 == 0                    # (R, R): a knight's move apart
        flat = flat.masked_fill(hidden, 0.0)
    return flat.view_as(video)


def psnr(a, b):
    """Peak signal-to-noise ratio of every frame in dB, 120 at most; pixels span 2.

    Shapes:  a and b (..., T, 3, H, W) in [-1, 1] -> (..., T) float64
    """
    error = (a.double() - b.double()) / 2
    return -10 * error.square().mean((-3, -2, -1)).clamp(min=1e-12).log10()


# ------------------------------------------------------------------------------------------ clips for measuring

def to_uint8(video):
    """Pixels to bytes by rounding. Shapes: (..., 3, H, W) in [-1, 1] -> (..., H, W, 3) numpy uint8."""
    video = (video.movedim(-3, -1).float() + 1) * 127.5
    return video.round().clamp(0, 255).byte().cpu().numpy()


def from_uint8(video):
    """Bytes to pixels. Shapes: (..., H, W, 3) uint8, numpy or not -> (..., 3, H, W) in [-1, 1]."""
    video = torch.as_tensor(video).movedim(-1, -3).contiguous()
    return (video / 127.5).sub_(1)


class Videos:
    """Clips on disk for measuring: a uint8 .npy (n, T, R, R, 3), and a .json with all that is known of them.

    `create` and `add` write, and go on where an equal run was stopped; `close` finishes with checksums.
    `open` checks them and reads. With tokens (n, N, d) these stand in `<stem>.tokens.npy`, float32.

    Shapes:  self[i, seed] -> (T, 3, R, R) in [-1, 1], label int: like a dataset, whatever the seed
    Raises:  SystemExit in one line for a full disk and for a damaged, foreign or unfinished file
    """

    def __init__(self, path):
        self.path = Path(path)
        self.about_path = self.path.with_suffix(".json")
        self.tokens_path = self.path.with_suffix(".tokens.npy")

    @classmethod
    def create(cls, path, settings, classes):
        """Open for appending; resumes where settings and classes are those of the clips already there."""
        self = cls(path)
        fresh = dict(settings=settings, classes=classes, labels=[], has_tokens=False, sha256={})
        self.about = json.loads(json.dumps(fresh))      # as it will be read back
        old = read_checked(self.about_path)
        if old is None and (self.path.exists() or self.about_path.exists()):
            raise SystemExit(f"{self.path} or its .json is not one of ours; choose another folder")
        with one_line(self.path):
            if old and all(old[key] == self.about[key] for key in ("settings", "classes")):
                if self.path.exists() and self.tokens_path.exists() >= old["has_tokens"]:
                    self.about = old
            if not self.about["labels"]:        # others may still read what stood there
                self.path.unlink(missing_ok=True)
                self.tokens_path.unlink(missing_ok=True)
        return self

    @property
    def done(self):
        """Clips written so far."""
        return len(self.about["labels"])

    def add(self, videos, labels, tokens=None):
        """Append k clips. Shapes: videos (k, T, 3, R, R) in [-1, 1], tokens (k, N, d)."""
        self.about["has_tokens"] = tokens is not None
        self.about["sha256"] = {}
        with one_line(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append(self.path, to_uint8(videos), self.done)
            if tokens is not None:
                append(self.tokens_path, tokens.float().cpu().numpy(), self.done)
        self.about["labels"] += [int(label) for label in labels]
        write_checked(self.about_path, self.about)      # last: what it does not count is not there

    def close(self):
        """Finish: the checksums by which `open` knows that all is there."""
        for path in [self.path] + [self.tokens_path] * self.about["has_tokens"]:
            self.about["sha256"][path.name] = file_hash(path)
        write_checked(self.about_path, self.about)

    @classmethod
    def open(cls, path):
        """Open for reading, after everything was checked."""
        self = cls(path)
        self.about = read_checked(self.about_path)
        if self.about is None:
            raise SystemExit(f"{path} has no whole .json of ours beside it; make the clips again")
        if not self.about["sha256"]:
            raise SystemExit(f"{path} is not finished; run the command that writes it again")
        try:
            names = {self.path.name: self.path, self.tokens_path.name: self.tokens_path}
            for name, known in self.about["sha256"].items():
                if file_hash(names[name]) != known:
                    raise ValueError("its checksum is another")
            self.pixels = np.load(self.path, mmap_mode="r")
            self.tokens = None
            if self.about["has_tokens"]:
                self.tokens = np.load(self.tokens_path, mmap_mode="r")
        except Exception as error:                      # damaged files raise anything
            raise SystemExit(f"{path} is damaged ({error}); make the clips again") from error
        self.shape = self.pixels.shape
        self.settings = self.about["settings"]
        self.classes = self.about["classes"]
        self.labels = np.array(self.about["labels"], dtype=np.int64)
        return self

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, key):
        i, _ = key
        return from_uint8(np.array(self.pixels[i])), int(self.labels[i])


def main(argv=None):
    """Command line: print what the data set holds. Returns the data set."""
    cfg = parse_config(Config, {}, argv)
    dataset = build_dataset(cfg)
    counts = np.bincount(dataset.labels, minlength=len(dataset.classes))
    print(f"{len(dataset)} videos of {len(dataset.classes)} classes; "
          f"clips of {cfg.frames} x {cfg.resolution}^2")
    print(", ".join(f"{name}: {count}" for name, count in zip(dataset.classes, counts)))
    return dataset


# ------------------------------------------------------------------------------------------ The method ends here
# Below: the command line, finding and scanning videos, exact seeking, files, pictures, the page of a run.

def parse_config(cls, presets, argv=None, dataset=None):
    """Turn a config dataclass into a command line: one flag a field, the comment on its line is the help.

    Authority: dataclass default < preset row picked by --dataset < explicit flag. `dataset` is the row
    used when the flag is absent. A comment that starts with `a|b|c:` allows those values only, one that
    starts with `lo..hi:` or `lo..:` numbers in that range. A field without a comment is a KeyError on
    purpose: settings that nobody explained do not ship. Unknown flags and bad values exit with 2.
    """
    notes = dict(re.findall(r"^ +(\w+):[^#\n]*#\s*(.+)$", inspect.getsource(cls), re.M))
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset", default=dataset or getattr(cls, "dataset", None))
    dataset = first.parse_known_args(argv)[0].dataset
    about = inspect.cleandoc(sys.modules[cls.__module__].__doc__).split("\n")[0]
    parser = argparse.ArgumentParser(allow_abbrev=False, description=about,
                                     usage="%(prog)s [--flag value ...]; --help lists the flags")
    for field in dataclasses.fields(cls):
        note = notes[field.name]
        kind = dict(type=field.type)
        values = re.match(r"([\w.]+(?:\|[\w.]+)+):", note)
        if field.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        elif values:
            kind["choices"] = [field.type(value) for value in values[1].split("|")]
            kind["metavar"] = field.name.upper()
        elif field.type in (int, float):
            kind["type"] = bounded(field.type, note)
        note = note.replace("%", "%%") + " (default: %(default)s)"
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, default=field.default, help=note, **kind)
    if presets:
        parser.set_defaults(dataset=dataset, **presets.get(dataset, {}))
    return cls(**vars(parser.parse_args(argv)))


def bounded(kind, note):
    """The type of a flag for argparse: a number within the `lo..hi:` of its comment; never nan or inf."""
    low = -sys.float_info.max
    high = sys.float_info.max
    limits = re.match(r"(-?[\d.]*\d)\.\.(-?[\d.]*\d)?:", note)
    if limits:
        low = kind(limits[1])
        high = kind(limits[2] or high)

    def read(text):
        value = kind(text)
        if not low <= value <= high:
            named = limits[0] if limits else "finite numbers:"
            raise argparse.ArgumentTypeError(f"{text} is outside {named[:-1]}")
        return value

    read.__name__ = kind.__name__       # argparse names it
    return read


# ------------------------------------------------------------------------------------------ finding videos

SUFFIXES = {"." + suffix for suffix in (
    "3gp asf avi divx f4v flv gif m2ts m4v mkv mov mp4 mpeg mpg mts ogv ts vob webm wmv y4m").split()}
LEAVINGS = {"__macosx", "@eadir", "$recycle.bin", "recycler", "lost+found", "#recycle", "@recycle",
            "system volume information"}
TREE = f"""a --data-root is expected to look like
    VIDEOS/
        ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi        one folder a class, any depth
        Archery/v_Archery_g01_c01.avi                      {" ".join(sorted(s[1:] for s in SUFFIXES))}
    UCF-101 is UCF101.rar of https://www.crcv.ucf.edu/data/UCF101.php (`unrar x` or `bsdtar -xf`)"""


def find_videos(cfg):
    """Every video file of --data-root, links to folders followed.

    Returns the root, the files in order, and what was left out as {reason: [names]}
    """
    root = Path(cfg.data_root)
    left_out = collections.defaultdict(list)
    if not cfg.data_root or not root.exists():
        raise SystemExit(f"--data-root {cfg.data_root!r} is not there; {TREE}")
    if root.is_file():
        return root.parent, [root], left_out
    found = []

    def walk(folder, above):
        real = os.path.realpath(folder)
        if real in above:                               # a link to a folder that it lies in
            return
        try:
            names = sorted(os.listdir(folder))
        except OSError:
            left_out["in a folder that cannot be read"].append(folder.name)
            return
        ours = written(folder)
        for name in names:
            path = folder / name
            if name.startswith(".") or name.casefold() in LEAVINGS:
                if name not in (".written", ".lock"):
                    left_out["hidden or left by a system"].append(name)
            elif os.path.isdir(path):
                walk(path, above | {real})
            elif name in ours:
                left_out["written by a run of ours"].append(name)
            elif path.suffix.lower() in SUFFIXES:
                found.append(path)
            else:
                left_out["other files"].append(path.suffix.lower() or name)

    walk(root, frozenset())
    return root, sorted(found), left_out


def report(root, left_out):
    """One line that counts and names what was left out, if anything was."""
    parts = []
    for why, names in left_out.items():
        if names:
            counts = collections.Counter(names).most_common(5)
            named = ", ".join(f"{name!r}" if n == 1 else f"{n} {name!r}" for name, n in counts)
            parts.append(f"{len(names)} {why} ({named})")
    if parts:
        print(f"{root}: left out {'; '.join(parts)}")


def class_of(path):
    """The class of a video: the name of its folder, whatever Unicode form and bytes it is stored in."""
    name = os.path.basename(os.path.dirname(os.path.abspath(path)))
    name = os.fsencode(name).decode("utf-8", "replace")
    return unicodedata.normalize("NFC", name)


def group_of(path, root):
    """Group 1..25 of a video: from its UCF-101 name, else a hash of its path below the root."""
    named = re.search(r"_g(0[1-9]|1[0-9]|2[0-5])_c[0-9][0-9]", path.name)
    if named:
        return int(named[1])
    return 1 + zlib.crc32(os.fsencode(path.relative_to(root))) % 25


def split_groups(split):
    """The groups 1..25 that train: all, train (8-25), test (1-7), as UCF-101's split 1; or 1-19,23."""
    named = {"all": "1-25", "train": "8-25", "test": "1-7"}.get(split, split)
    groups = set()
    for part in named.split(","):
        ends = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", part)
        first = int(ends[1]) if ends else 0
        last = int(ends[2] or first) if ends else 0
        if not 1 <= first <= last <= 25:
            raise SystemExit(f"--split {split}: all, train, test or groups of 1-25 such as 1-19,23")
        groups.update(range(first, last + 1))
    return groups


def scan(files, root, index_path):
    """Look through every file once: how many frames decode, and where decoding may begin.

    What index.json already knows is taken from there where size and time of change agree.
    Returns {path: dict(size, mtime, frames, keys, error)}; frames is 0 where a file cannot be read
    """
    index = read_checked(index_path)
    if index is None:
        index = {}
        if index_path.exists():                         # damaged, or somebody else's
            with one_line(index_path):
                index_path.replace(index_path.with_suffix(".json.old"))

    def look(path, stop):
        found = dict(size=0, mtime=0, frames=0, keys=[], error="")
        try:
            found["size"] = path.stat().st_size
            found["mtime"] = path.stat().st_mtime
            old = index.get(str(path.relative_to(root)), {"keys": []})
            if old["keys"] and all(old[key] == found[key] for key in ("size", "mtime")):
                return old
            found["frames"], found["keys"], found["error"] = survey(path, stop)
        except Exception as problem:                    # hostile files raise anything
            found["error"] = f"{type(problem).__name__}: {problem}"
        return found

    fresh = {}
    before = dict(index)
    try:
        looks = in_threads(look, files, desc="scanning videos", unit="file")
        for path, found in zip(files, looks):
            fresh[path] = found
            index[str(path.relative_to(root))] = found
            if len(fresh) % 5000 == 0 and index != before:
                write_checked(index_path, index)
    except KeyboardInterrupt:
        raise SystemExit("stopped while scanning videos; the next run goes on from here") from None
    finally:
        if index != before:
            write_checked(index_path, index)            # what it knows of another folder stays
    return fresh


def in_threads(work, items, **bar):
    """work(item, stop) of every item, in order, by threads with a bar.

    When the caller stops, by Ctrl-C or otherwise, `stop` is set and `decode` ends at its next packet
    """
    stop = threading.Event()
    pool = ThreadPoolExecutor()                         # the decoder releases the interpreter lock
    try:
        results = pool.map(functools.partial(work, stop=stop), items)
        yield from progress(results, total=len(items), leave=False, **bar)
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------------------------ exact seeking

NEVER = threading.Event()


def decode(path, stamp=None, stop=NEVER, damage=None):
    """The frames of a video in order; with `stamp`, from the key frame that has this time stamp.

    A damaged packet costs its own frames, and is noted in the list `damage`.

    Returns  pairs of a frame and its pixel aspect (width by height)
    Raises:  whatever the decoder raises for a file that it cannot open
    """
    if not os.path.isfile(path):                        # opening a named pipe would wait for ever
        raise FileNotFoundError("not a regular file")
    damage = [] if damage is None else damage
    # Names may hold colons and files may name addresses: both stay local files.
    with av.open(f"file:{path}", options={"protocol_whitelist": "file"}) as file:
        stream = choose_stream(file)
        stream.codec_context.options = {"max_pixels": str(2 ** 25)}     # 8K; damaged headers claim anything
        stream.codec_context.thread_count = 1           # loader workers and the scan run side by side already
        aspect = stream.sample_aspect_ratio or 1
        if not 1 / 8 < aspect < 8:
            aspect = 1
        if stamp is not None:
            file.seek(stamp, stream=stream)
        packets = file.demux(stream)
        packet = True
        while packet:
            if stop.is_set():
                raise KeyboardInterrupt
            try:
                packet = next(packets, None)
                frames = packet.decode() if packet else []
            except av.FFmpegError as error:
                damage.append(f"{type(error).__name__}: {error}")
                continue
            for frame in frames:
                if stamp is None or frame.pts == stamp:
                    stamp = None                        # the key frame is found: all from here on
                    yield frame, aspect


def choose_stream(file):
    """The video stream that a player would show: the default one, never a cover picture."""
    cover = av.stream.Disposition.attached_pic
    films = [stream for stream in file.streams.video if not stream.disposition & cover]
    best = file.streams.best("video")
    if not films:
        raise ValueError("no film in it")
    if best in films:
        return best
    return films[0]


def survey(path, stop=NEVER):
    """Count the frames that really decode, as headers of damaged files lie; list where decoding may begin.

    Returns  count, [[frame index, time stamp]] of key frames at least 8 apart, what was damaged
    Raises:  what the decoder raises
    """
    stamps = []
    keys = [[0, None]]
    damage = []
    for k, (frame, _) in enumerate(decode(path, stop=stop, damage=damage)):
        stamps.append(frame.pts)
        if frame.key_frame and k >= keys[-1][0] + 8:    # nearer ones gain little and make a long index
            keys.append([k, frame.pts])
    if not stamps:
        raise ValueError(f"no frame decodes {damage[:1]}")
    # B-frames in avi: stamps do not name frames. Damage: frames may be missing when begun elsewhere.
    rising = None not in stamps and all(a < b for a, b in zip(stamps, stamps[1:]))
    if damage or not rising:
        keys = keys[:1]
    return len(stamps), keys, "; ".join(damage[:3])


def count_frames(path):
    """Number of frames that really decode. Raises what the decoder raises."""
    return survey(path)[0]


def read_frames(path, indices, resolution, keys=((0, None),), stop=NEVER):
    """Frames `indices` (ascending) of a video, exactly; begins at the last of `keys` (`survey`) before.

    Shapes:  -> (len(indices), R, R, 3) uint8; every frame is shrunk before the next is decoded
    Raises:  ValueError when the file is unreadable or ends too early
    """
    problem = "it ends too early"
    scaler = VideoReformatter()                         # PyAV's own keeps threads, which no fork survives
    nearest = max(key for key in keys if key[0] <= indices[0])
    for first, stamp in (nearest, (0, None)):           # 0: where a seek failed
        try:
            pictures = []
            numbers = range(first, indices[-1] + 1)
            for k, (frame, aspect) in zip(numbers, decode(path, stamp, stop)):
                if k in indices:
                    pictures.append(shrink(upright(frame, aspect, scaler), resolution))
            if len(pictures) == len(indices):
                return torch.stack(pictures)
        except Exception as error:                      # hostile files raise anything
            problem = repr(error)
    raise ValueError(f"cannot read frames {indices[0]}..{indices[-1]} of {str(path)!r}: {problem} "
                     f"(av {av.__version__}; 17 or later is needed)")


def upright(frame, aspect, scaler):
    """A frame as a player shows it: square pixels, turned and mirrored. Shapes: -> (H, W, 3) uint8."""
    width = max(round(frame.width * aspect), 1)
    image = scaler.reformat(frame, width=width, format="rgb24", threads=1).to_ndarray()
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:
        a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5]      # x' = a x + c y, y' = b x + d y
        if abs(a) < abs(b):                             # a quarter turn
            image = image.swapaxes(0, 1)
            a = c
            d = b
        if a < 0:
            image = image[:, ::-1]
        if d < 0:
            image = image[::-1]
    return np.ascontiguousarray(image)


def shrink(image, resolution):
    """Shorter side to R (bilinear, antialiased, whole levels), centre crop.

    Shapes:  (H, W, 3) uint8 -> (R, R, 3) uint8
    Source:  choice (the paper names only the size): antialias as LARP, whose protocol the paper follows
    """
    x = torch.from_numpy(image).permute(2, 0, 1)[None]  # resized as uint8: float takes 4 times as long
    h, w = image.shape[:2]
    if max(h, w) > 64 * min(h, w):
        raise ValueError(f"a picture of {w} x {h} pixels")
    size = [max(resolution, round(side * resolution / min(h, w))) for side in (h, w)]
    x = F.interpolate(x, size, mode="bilinear", antialias=True)
    top = (size[0] - resolution) // 2
    left = (size[1] - resolution) // 2
    return x[0, :, top:top + resolution, left:left + resolution].permute(1, 2, 0).contiguous()


# ------------------------------------------------------------------------------------------ files and processes

@contextlib.contextmanager
def one_line(path):
    """A disk that is full or cannot be written ends the program in one line."""
    try:
        yield
    except OSError as error:
        raise SystemExit(f"cannot write {path}: {error.strerror or error}") from error


def write_file(path, blob):
    """Write a whole file or none of it: beside its name first, then renamed."""
    part = path.with_name(f".{os.getpid()}.part")
    with one_line(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(blob)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def write_checked(path, about):
    """A dict as .json with a checksum, so that a damaged or foreign file is never trusted."""
    text = json.dumps(about)
    write_file(path, f'{{"data.py": {zlib.crc32(text.encode())},\n"about": {text}}}\n'.encode())


def read_checked(path):
    """What `write_checked` wrote there; None where the file is absent, damaged or somebody else's."""
    try:
        found = json.loads(path.read_text())
        if found["data.py"] == zlib.crc32(json.dumps(found["about"]).encode()):
            return found["about"]
    except Exception:                                   # damaged files raise anything
        pass
    return None


def append(path, rows, done):
    """Write `rows` behind the first `done` rows of an .npy, over whatever a stopped run left there.

    Ordinary writes: a full disk is an OSError, where a memory map would end the process with SIGBUS
    """
    header = io.BytesIO()
    about = dict(shape=(done + len(rows), *rows.shape[1:]), fortran_order=False,
                 descr=np.lib.format.dtype_to_descr(rows.dtype))
    np.lib.format.write_array_header_1_0(header, about)             # as long for any count
    with open(path, "r+b" if done else "wb") as file:
        file.truncate(len(header.getvalue()) + done * rows[0].nbytes)
        file.seek(0, os.SEEK_END)
        file.write(rows.tobytes())
        file.seek(0)
        file.write(header.getvalue())


def file_hash(path):
    """sha256 of a file, read in blocks. Returns hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def written(folder):
    """Names of the pictures and videos that `save_video` wrote into a folder."""
    try:
        return set((Path(folder) / ".written").read_text(encoding="utf-8").split("\n"))
    except (OSError, ValueError):
        return set()


@contextlib.contextmanager
def claim(folder):
    """Make a run's folder and hold it: a second run into it, or a folder that cannot be, is one line."""
    folder = Path(folder)
    with one_line(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a")
    with lock:                                          # the system lets go when the process ends
        try:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"another run is writing into {folder}; choose another --out") from None
        except OSError:                                 # a network disk without locks
            pass
        yield


def ranks():
    """(rank, world): which process this is, of how many, as torchrun says; (0, 1) without it."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    told = {name: os.environ.get(name, "") for name in names}
    rank = told["RANK"] or "0"
    world = told["WORLD_SIZE"] or "1"
    if world == "1" and rank == "0":
        return 0, 1
    if not (all(told.values()) and re.fullmatch("[0-9]+ [0-9]+", f"{rank} {world}")
            and int(rank) < int(world)):
        raise SystemExit(f"{told}: not as torchrun sets them; unset RANK and WORLD_SIZE, or use torchrun")
    return int(rank), int(world)


def alone(script):
    """One line and exit 1 where torchrun started several processes of a script that runs in one."""
    if ranks()[1] > 1:
        raise SystemExit(f"{script} runs in one process; start it with python, not torchrun")


def progress(iterable=None, quiet=False, **settings):
    """A tqdm bar on a terminal; none in a log file, with `quiet` or where TQDM_DISABLE is set."""
    silenced = os.environ.get("TQDM_DISABLE", "0").lower() not in ("", "0", "false")
    off = quiet or silenced or not sys.stderr.isatty()
    return tqdm(iterable, disable=off, **settings)


def free_memory(device):
    """Bytes that are free on a device; infinite where the system does not say."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return int(re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    except (OSError, TypeError):
        return math.inf


def load_lpips(name, device):
    """LPIPS (arXiv 1801.03924), frozen; a loss of stage 1 and a measurement. SystemExit without weights."""
    import lpips                    # takes seconds, and most runs do not need it
    try:
        return lpips.LPIPS(net=name, verbose=False).to(device).eval().requires_grad_(False)
    except (OSError, RuntimeError) as error:
        raise SystemExit(f"no {name} weights for LPIPS ({error}): put torchvision's file into "
                         f"{torch.hub.get_dir()}/checkpoints, or choose another --lpips-net, or do without "
                         "it (stage 1: --lpips-weight 0; fvd.py: --lpips-net none)") from error


# ------------------------------------------------------------------------------------------ pictures

def enlarge(video, side):
    """Whole times as large, smoothly, until the picture is about `side` wide. Shapes: (..., 3, H, W)."""
    scale = max(side // max(video.shape[-2:]), 1)
    if scale == 1:
        return video
    flat = video.flatten(0, -4).float()
    return F.interpolate(flat, scale_factor=scale, mode="bicubic").clamp(-1, 1).unflatten(0, video.shape[:-3])


def tile(videos, columns, labels=()):
    """Videos side by side on white, each below its label; small ones are enlarged to about 128 pixels.

    Shapes:  videos (n, T, 3, H, W) in [-1, 1], labels n strings or none -> (T, 3, H', W')
    """
    videos = enlarge(videos.cpu(), 128)
    n, T, _, H, W = videos.shape
    text = 20 if labels else 0
    border = 4
    h = H + text + border
    w = W + border
    sheet = torch.ones(T, 3, -(-n // columns) * h + border, columns * w + border)
    for i, video in enumerate(videos):
        top = border + i // columns * h
        left = border + i % columns * w
        sheet[..., top + text:top + text + H, left:left + W] = video
        if labels:
            strip = torch.from_numpy(np.array(write_label(labels[i], W, text)))
            sheet[..., top:top + text, left:left + W] = strip / 127.5 - 1
    return sheet


def write_label(label, width, height):
    """A grey picture of a label in the largest letters that fit, cut where none do."""
    strip = Image.new("L", (width, height), 255)
    pen = ImageDraw.Draw(strip)
    for size in range(height - 5, 8, -1):
        font = ImageFont.load_default(size)
        if pen.textlength(label, font) <= width:
            break
    pen.text((0, height / 2), label, fill=0, font=font, anchor="lm")
    return strip


def save_video(path, video, fps=8):
    """Write one video as mp4, gif or png by the suffix; a png is a contact sheet, time from left to right.

    Frames below 128 pixels are enlarged to about 256. What is written is noted in the folder's `.written`,
    so that no run trains on it; a file that is not in there is never replaced.
    Shapes:  video (T, 3, H, W) in [-1, 1]
    Raises:  SystemExit in one line for a full disk and for a file that is not ours
    """
    path = Path(path)
    ours = path.name in written(path.parent)
    if path.exists() and not ours:
        raise SystemExit(f"{path} is not one of ours: move it away, or choose another folder")
    if path.suffix == ".png" and len(video) > 1:
        video = tile(video[None].transpose(0, 1), len(video))                       # (1, 3, H', W')
    if max(video.shape[-2:]) < 128:
        video = enlarge(video, 256)
    frames = to_uint8(video)                                                        # (T, H, W, 3)
    if path.suffix == ".mp4":
        odd = [(0, side % 2) for side in frames.shape[1:3]]
        frames = np.pad(frames, ((0, 0), *odd, (0, 0)), mode="edge")
        blob = iio.imwrite("<bytes>", frames, extension=".mp4", plugin="pyav", codec="libx264", fps=fps,
                           in_pixel_format="rgb24")
    else:
        blob = still_or_gif(path.suffix, frames, fps)
    if not ours:
        with one_line(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path.parent / ".written", "a", encoding="utf-8") as file:
                file.write(path.name + "\n")
    write_file(path, blob)


def still_or_gif(suffix, frames, fps):
    """Encode frames (T, H, W, 3) as .png (the first) or .gif. Returns bytes.

    Units:   a gif counts hundredths of a second, and browsers play less than two of them as ten: above 50
             frames a second some are left out, and delays are rounded so that the sum stays right
    """
    frames = [Image.fromarray(frame) for frame in frames]
    blob = io.BytesIO()
    if suffix == ".png":
        frames[0].save(blob, "png")
        return blob.getvalue()
    step = max(math.ceil(fps / 50), 1)
    shown = frames[::step]
    ends = [round(100 * min(k + step, len(frames)) / fps) for k in range(0, len(frames), step)]
    delays = [10 * max(int(delay), 2) for delay in np.diff(ends, prepend=0)]
    shown[0].save(blob, "gif", save_all=True, append_images=shown[1:], duration=delays, loop=0)
    return blob.getvalue()


# ------------------------------------------------------------------------------------------ the page of a run

def write_page(folder, title, settings):
    """index.html of a run's folder: curves of log.jsonl, settings, newest pictures, videos, sliders.

    It opens from the disk without a server, and names only files that are there. An index.html that
    is not ours stays, and the page is written to run.html.
    """
    folder = Path(folder)
    mark = "<!-- the page of a run, by data.py -->"
    page = folder / "index.html"
    if page.exists() and mark not in page.read_text(errors="replace"):
        page = folder / "run.html"
    sheet = read_sheet(folder)
    ours = [folder / name for name in written(folder) if name and (folder / name).is_file()]
    ours.sort(key=lambda path: (-path.stat().st_mtime, path.name))
    pictures = [p.name for p in ours if p.suffix in (".gif", ".png") and p.name != "interp_sheet.png"]
    films = sorted(path.name for path in ours if path.suffix == ".mp4")
    rows = "".join(f"<tr><th>{html.escape(str(key))}<td>{html.escape(str(value))}"
                   for key, value in settings.items())
    data = json.dumps(dict(rows=read_log(folder / "log.jsonl"), sheet=sheet)).replace("<", "\\u003c")
    parts = {
        "TITLE": html.escape(title),
        "MARK": mark,
        "FILMS": "".join(figure("<video muted autoplay loop playsinline src='{}'></video>", name)
                         for name in films[:24]),
        "PICTURES": "".join(figure("<img loading=lazy alt='' src='{}'>", name) for name in pictures[:6]),
        "SETTINGS": rows,
        "DATA": data,
    }
    text = re.sub("|".join(f"%{name}%" for name in parts), lambda found: parts[found[0][1:-1]], PAGE)
    write_file(page, text.encode())


def figure(element, name):
    """A picture or video of the page, with its name below."""
    return f"<figure>{element.format(urllib.parse.quote(name))}<figcaption>{html.escape(name)}</figure>\n"


def read_log(path):
    """At most about 500 rows of a log, the last one always: finite numbers only, exactly as logged."""
    rows = []
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, AttributeError):       # a line that a stop cut off
                row = json.loads(line).items()
                rows.append({key: value for key, value in row
                             if type(value) in (int, float) and math.isfinite(value)})
    step = -(-len(rows) // 500) or 1
    return rows[::-1][::step][::-1]


def read_sheet(folder):
    """What interp_sheet.json says of interp_sheet.png, if both are there; else None."""
    try:
        sheet = json.loads((folder / "interp_sheet.json").read_text())
    except (OSError, ValueError):
        return None
    if (folder / "interp_sheet.png").is_file():
        return sheet
    return None


PAGE = """<!doctype html>
%MARK%
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>%TITLE%</title>
<h1>%TITLE%</h1>
%FILMS%
%PICTURES%
<table>%SETTINGS%</table>
<script type="application/json" id="data">%DATA%</script>
"""


if __name__ == "__main__":
    main()
