"""Videos in, videos out: toy clips, UCF-101, Kinetics-600, any folder; and clips for measuring.

    file -> T frames, `stride` apart -> shorter side to R -> centre crop -> (T, 3, R, R) in [-1, 1]

Letters: B videos, T frames, R = H = W pixels, M videos in a dataset.
Ranges:  a clip is float32 in [-1, 1], shape (T, 3, R, R); bytes on disk and in memory only.
A dataset is indexed by (video, seed): the seed alone says which frames, and whether to mirror them.

    python data.py --dataset folder --data-root VIDEOS    # what training would find, and leave out
"""
import argparse
import collections
import contextlib
import hashlib
import inspect
import json
import math
import os
import re
import sys
import unicodedata
import zlib
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import av
import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageFont
from tqdm import tqdm


@dataclass(frozen=True)
class Config:
    """Settings of this file run as a program. Training has its own, with the same names."""

    dataset: str = "toy"            # toy|ucf|k600|folder: the clips
    data_root: str = ""             # folder of videos, one sub-folder a class (not needed for toy)
    split: str = "all"              # all, train, test or a list of groups such as 1-19,23
    frames: int = 16                # 1..: T, frames of a clip
    stride: int = 1                 # 0..: step in the file between frames; 0 spreads them over all
    resolution: int = 128           # 1..: R, height and width in pixels
    flip: bool = True               # mirror half of the clips
    out: str = "out/data"           # folder of index.json, the list of the videos
    seed: int = 0                   # 0..4294967295: fixes which toy clips


# ------------------------------------------------------------------------------ toy clips

# red, yellow, green, cyan, blue, magenta, white
COLOURS = "#d7413c #dcc83c #46be55 #46c8cd #4b69e1 #cd55c3 #dcdcdc".split()
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
    colour = ImageColor.getrgb(rng.choice(COLOURS))
    colour = np.array(colour)[:, None, None] / 127.5 - 1                            # (3, 1, 1)
    ground = rng.uniform(-0.75, -0.35) + rng.uniform(-0.05, 0.05, (3, 1, 1))        # dark grey, slightly tinted
    r = rng.uniform(0.44, 0.56)
    time = np.linspace(-0.5, 0.5, frames)                              # any T spans the same motion
    if motion == "pulsing":
        centre = rng.uniform(0.6 * r - 0.6, 0.6 - 0.6 * r, 2)[None]                 # (1, 2)
        beat = np.sin(2 * np.pi * (rng.uniform(0.8, 1.2) * time + rng.random()))    # (T,)
        r = r * (1 + 0.4 * beat)[:, None, None]                                     # (T, 1, 1)
    else:
        angle = rng.uniform(0, 2 * np.pi)
        way = rng.uniform(0.45, 0.8) * np.array([np.cos(angle), np.sin(angle)])     # (2,) first frame to last
        room = np.maximum(0.97 - r - abs(way) / 2, 0)                   # it stays in the picture
        centre = rng.uniform(-room, room) + np.outer(time, way)                     # (T, 2)
    grid = (np.arange(resolution) + 0.5) * 2 / resolution - 1                       # (R,)
    x = grid - centre[:, 0, None, None]                                             # (T or 1, 1, R)
    y = centre[:, 1, None, None] - grid[:, None]                                    # (T or 1, R, 1), up
    if shape == "pillar":           # a bar that stands
        x, y = y, x
    if shape == "ball":             # signed distance to the outline: negative inside
        distance = np.hypot(x, y) - 0.8 * r
    elif shape == "ring":
        distance = abs(np.hypot(x, y) - 0.76 * r) - 0.24 * r
    else:
        distance = np.maximum(abs(x) - r, abs(y) - 0.36 * r)
    cover = np.clip(0.5 - distance * resolution / 4, 0, 1)[:, None]     # (T, 1, R, R); soft edges
    video = ground + cover * (colour - ground)                                      # (T, 3, R, R)
    return torch.from_numpy(video).float()


@dataclass
class ToyVideos:
    """Moving shapes, drawn on the fly; the held-out ones come from another random stream.

    Shapes:  self[i, seed] -> (T, 3, R, R) float32 in [-1, 1], label int
    """

    cfg: object
    held_out: bool = False
    classes = [f"{shape} {motion}" for shape in SHAPES for motion in MOTIONS]
    labels = np.arange(TOY_VIDEOS) % len(classes)
    files = None                    # no files to name

    def __len__(self):
        return TOY_VIDEOS

    def keep(self, device):
        """Nothing to keep: they are drawn, not decoded."""

    def __getitem__(self, key):
        i, _ = key                  # a toy video has no other frames to choose from
        label = int(self.labels[i])
        rng = np.random.default_rng([self.cfg.seed, self.held_out, i])
        return draw_toy(rng, label, self.cfg.frames, self.cfg.resolution), label


# ------------------------------------------------------------------------------ videos of a folder

class VideoFolder:
    """The videos below a folder; the class of a video is the name of the folder that holds it.

    A video belongs to a *group* 1..25: the `_gNN_` of a UCF-101 name (clips of one group are cut
    from one source video, so a split by clip leaks), else a hash of its name. `split` names the
    groups that train, the rest is held out. A class exists where a clip of it can train, and the
    held-out videos have the same classes. What is left out is counted and named.

    Shapes:  self[i, seed] -> (T, 3, R, R) float32 in [-1, 1], label int
    Raises:  SystemExit, with the expected tree where no video can be used
    """

    kept = None                     # the videos, after `keep`

    def __init__(self, cfg, held_out=False):
        self.cfg = cfg
        groups = split_groups(cfg.split)
        root, names, left_out = find_videos(cfg)
        index = scan(root, names, Path(cfg.out) / "index.json")
        span = (cfg.frames - 1) * max(cfg.stride, 1) + 1
        self.classes = sorted({class_of(root / name) for name in names
                               if index[name]["frames"] >= span and group_of(name) in groups})
        self.files = []
        self.found = []
        for name in names:
            if index[name]["frames"] < span:
                left_out[f"unreadable or shorter than {span} frames ({cfg.out}/index.json)"].append(name)
            elif class_of(root / name) not in self.classes:
                left_out["of a class that does not train"].append(name)
            elif held_out != (group_of(name) in groups):
                self.files.append(root / name)
                self.found.append(index[name])
        if not held_out:
            for why, some in left_out.items():
                print(f"{root}: left out {len(some)} {why}: {some[:3]}")
        if not self.classes:
            raise SystemExit(f"--data-root {root}: of {len(names)} videos none is readable, has {span} "
                             f"frames and is in the groups of --split {cfg.split}; {TREE}")
        self.labels = np.array([self.classes.index(class_of(path)) for path in self.files], int)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, key):
        i, seed = key
        rng = np.random.default_rng(seed)
        for _ in range(10):         # a file that broke since the scan must not end a long run
            try:
                return self.draw(i, rng), int(self.labels[i])
            except Unreadable as error:
                say(f"skipping: {error}", sys.stderr)
                problem = error
            i = int(rng.integers(len(self)))    # its label comes along, so labels cannot shift
        raise problem

    def draw(self, i, rng):
        """One clip of video i, at random. Shapes: -> (T, 3, R, R)."""
        frames = self.found[i]["frames"]
        steps = self.cfg.frames - 1
        stride = self.cfg.stride or (frames - 1) // max(steps, 1) or 1
        start = int(rng.integers(frames - steps * stride))
        clip = from_uint8(self.read(i, slice(start, start + steps * stride + 1, stride)))
        if self.cfg.flip and rng.random() < 0.5:
            clip = clip.flip(-1)
        return clip

    def keep(self, device):
        """Decode every video once and keep it, small and as bytes, on the training device.

        Raises: SystemExit in one line where memory is short, or a video broke since the scan
        """
        need = sum(found["frames"] for found in self.found) * 3 * self.cfg.resolution ** 2
        print(f"{len(self)} videos take {need / 1e9:.3f} GB of the memory of {device}")
        if need > 0.8 * free_memory(device):
            raise SystemExit(f"the videos take {need / 1e9:.3f} GB, more than {device} has free: "
                             "give --no-in-memory, or fewer videos")
        videos = in_threads(self.read, range(len(self)), "decoding videos")
        self.kept = [video.to(device) for video in videos]                          # (n, R, R, 3) each

    def read(self, i, part=slice(None)):
        """A slice of the frames of video i, all by default. Shapes: -> (n, R, R, 3) uint8."""
        if self.kept:
            return self.kept[i][part]
        found = self.found[i]
        indices = range(found["frames"])[part]
        return read_frames(self.files[i], indices, self.cfg.resolution, found["keys"])


def build_dataset(cfg, held_out=False):
    """The training clips of `cfg.dataset`, or those kept out of it (none with --split all)."""
    if cfg.dataset == "toy":
        return ToyVideos(cfg, held_out)
    return VideoFolder(cfg, held_out)


def read_clip(path, start, frames, stride, resolution):
    """T frames of a file from frame `start`, `stride` apart.

    Shapes:  -> (T, 3, R, R) in [-1, 1]
    Raises:  Unreadable
    """
    return from_uint8(read_frames(path, range(start, start + frames * stride, stride), resolution))


# ------------------------------------------------------------------------------ what tasks ask of clips

def condition_video(video, kind):
    """The clip that a conditional generator is shown, as long as the one it has to make.

    Shapes:  video (..., T, 3, R, R) -> the same; kind frames|image|edge
    Source:  paper (Sec. 4.3): the first 5 frames, then the 5th repeated
             choice (E.7 does not say how they are made): image: the first frame repeated,
             edge: how steep the grey of every frame is
    """
    if kind == "edge":
        grey = video.mean(-3, keepdim=True)                                         # (..., T, 1, R, R)
        down, right = torch.gradient(grey, dim=(-2, -1))
        edges = 4 * torch.hypot(down, right) - 1                                    # no edge is black
        return edges.clamp(max=1).expand_as(video)
    last = 4 if kind == "frames" else 0                                 # the last frame that is shown
    index = torch.arange(video.shape[-4]).clamp(max=last)
    return video[..., index, :, :, :]


def degrade(video, kind):
    """A damaged copy of a clip: for restoration the encoder sees this, and is asked for the clean one.

    Shapes:  video (..., T, 3, R, R) in [-1, 1] -> the same; kind none|downsample|blur|inpaint
    Source:  paper (NeRV-Enc A.3): the three kinds
             choice (no strengths are given): R / 22 pixels a side, a Gaussian of R / 40, every
             seventh cell of an 8 x 8 grid; they bring real clips of 256 x 256 near its input PSNR
    """
    R = video.shape[-1]
    flat = video.reshape(-1, 1, R, R)                                               # (n, 1, R, R)
    if kind == "downsample":
        small = F.interpolate(flat, R // 22 or 1, mode="bilinear", antialias=True)
        flat = F.interpolate(small, R, mode="bilinear")
    elif kind == "blur":
        reach = R // 13 + 1
        flat = blur(F.pad(flat, [reach] * 4, mode="replicate"), R / 40, reach)
    elif kind == "inpaint":
        cell = torch.arange(R, device=video.device) * 8 // R
        hidden = (cell[:, None] * 2 + cell) % 7 == 0                    # (R, R): a knight's move apart
        flat = flat.masked_fill(hidden, 0.0)
    return flat.view_as(video)


def blur(x, sigma, reach):
    """A Gaussian over 2 r + 1 pixels a side, r = reach. Shapes: (n, 1, H, W) -> (n, 1, H - 2 r, W - 2 r)."""
    offset = torch.arange(-reach, reach + 1).to(x)
    tap = torch.softmax(-(offset / sigma) ** 2 / 2, 0).view(1, 1, 1, -1)            # their sum is 1
    return F.conv2d(F.conv2d(x, tap), tap.mT)


def psnr(a, b):
    """Peak signal-to-noise ratio of every frame in dB, 120 at most; pixels span 2.

    Shapes:  a and b (..., T, 3, H, W) in [-1, 1] -> (..., T) float64
    """
    error = (a.double() - b.double()) / 2
    return -10 * error.square().mean((-3, -2, -1)).clamp(min=1e-12).log10()


# ------------------------------------------------------------------------------ clips for measuring

def to_uint8(video):
    """Pixels to bytes, rounded. Shapes: (..., 3, H, W) in [-1, 1] -> (..., H, W, 3) numpy uint8."""
    video = (video.movedim(-3, -1) + 1) * 127.5
    return video.round().clamp(0, 255).byte().cpu().numpy()


def from_uint8(video):
    """Bytes to pixels. Shapes: (..., H, W, 3) uint8, numpy or not -> (..., 3, H, W) in [-1, 1]."""
    return torch.as_tensor(video).movedim(-1, -3).contiguous() / 127.5 - 1


class Videos:
    """Clips on disk for measuring: a uint8 .npy (n, T, R, R, 3), a .json that says what they are.

    `create` and `add` write, and go on where an equal run was stopped; `close` adds checksums.
    `open` reads, after it checked them. Weight tokens go beside them, to `<stem>.tokens.npy`.

    Shapes:  self[i, seed] -> (T, 3, R, R) in [-1, 1], label int: as a dataset, whatever the seed;
             self.tokens (n, N, d) float32 or None
    Raises:  SystemExit in one line for a full disk, and for a damaged, foreign or unfinished file
    """

    def __init__(self, path):
        self.path = Path(path)
        self.about_path = self.path.with_suffix(".json")
        self.tokens_path = self.path.with_suffix(".tokens.npy")
        self.about = read_checked(self.about_path)

    @classmethod
    def create(cls, path, settings, classes):
        """Open for appending; goes on where the clips there have these settings and classes."""
        self = cls(path)
        asked = json.loads(json.dumps(dict(settings=settings, classes=classes)))    # as it is read back
        there = self.path.exists()
        if there and not self.about:
            raise SystemExit(f"{path} is not ours, as it has no .json beside it: move it away")
        if not there or not asked.items() <= self.about.items():
            self.about = dict(asked, labels=[], sha256={})
            write_checked(self.about_path, self.about)  # first: a disk that is full later leaves no stranger
        return self

    def add(self, videos, labels, tokens=None):
        """Append k clips. Shapes: videos (k, T, 3, R, R) in [-1, 1], labels k, tokens (k, N, d)."""
        with told(f"cannot write {self.path}"):
            append(self.path, to_uint8(videos), len(self))
            if tokens is not None:
                append(self.tokens_path, tokens.float().cpu().numpy(), len(self))
        self.about["labels"] += map(int, labels)
        write_checked(self.about_path, self.about)      # last: what it does not count is not there

    def hashes(self):
        """{name: sha256} of the files that are there."""
        return {path.name: file_hash(path) for path in (self.path, self.tokens_path) if path.exists()}

    def close(self):
        """Finish: the checksums by which `open` knows that all is there. Returns what it opens."""
        if not self.about["sha256"]:                    # finished before: those checksums stay
            self.about["sha256"] = self.hashes()
            write_checked(self.about_path, self.about)
        return Videos.open(self.path)

    @classmethod
    def open(cls, path):
        """Open for reading, after everything was checked."""
        self = cls(path)
        if not self.about or self.about["sha256"] != self.hashes():
            raise SystemExit(f"{path} is unfinished, or one of its files has changed: make the clips again")
        self.pixels = np.load(self.path, mmap_mode="r")
        self.tokens = None
        if self.tokens_path.exists():
            self.tokens = np.load(self.tokens_path, mmap_mode="r")
        self.settings = self.about["settings"]
        self.classes = self.about["classes"]
        self.labels = np.array(self.about["labels"])
        return self

    def __len__(self):
        """Clips written so far."""
        return len(self.about["labels"])

    def __getitem__(self, key):
        i, _ = key
        return from_uint8(np.array(self.pixels[i])), int(self.labels[i])


def main(argv=None):
    """Command line: print what the data set holds. Returns the data set."""
    cfg = parse_config(Config, {}, argv)
    dataset = build_dataset(cfg)
    print(f"{len(dataset)} videos of {len(dataset.classes)} classes; "
          f"clips of {cfg.frames} x {cfg.resolution}^2")
    for label, name in enumerate(dataset.classes):
        print(f"{(dataset.labels == label).sum():8d} {name}")
    return dataset


# ------------------------------------------------------------------------------ The method ends here
# Below: the command line, finding videos, exact seeking, files and processes, pictures, the page.

def parse_config(cls, presets, argv=None, dataset=None):
    """Turn a config dataclass into a command line: a flag for each field, its comment is the help.

    Authority: dataclass default < preset row picked by --dataset < explicit flag. `dataset` is the
    row used when the flag is absent. A comment that starts with `a|b|c:` allows those values only,
    one that starts with `lo..hi:` or `lo..:` numbers in that range. A field without a comment is a
    KeyError on purpose: settings that nobody explained do not ship. Bad values exit with 2.
    """
    notes = dict(re.findall(r"^ +(\w+):[^#\n]*#\s*(.+)$", inspect.getsource(cls), re.M))
    parser = argparse.ArgumentParser(allow_abbrev=False, description=inspect.getmodule(cls).__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="%(prog)s [--flag value ...]; --help lists the flags")
    for name, kind in cls.__annotations__.items():
        how = dict(type=kind)
        if kind is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        parser.add_argument(f"--{name.replace('_', '-')}", default=getattr(cls, name), **how,
                            help=f"{notes[name]} (default: %(default)s)")
    if dataset:
        parser.set_defaults(dataset=dataset)
    if presets:
        row = parser.parse_args(argv).dataset
        parser.set_defaults(**presets.get(row, {}))
    cfg = cls(**vars(parser.parse_args(argv)))
    for name, value in vars(cfg).items():
        if not allowed(value, notes[name]):
            parser.error(f"--{name.replace('_', '-')} {value!r}: {notes[name]}")
    return cfg


def allowed(value, note):
    """Whether a setting is what the start of its comment allows; nan and inf are in no range."""
    rule = note.split(":")[0]
    if "|" in rule:
        return str(value) in rule.split("|")
    if ".." in rule:
        low, high = rule.split("..")
        return float(low) <= value <= float(high or 1e300)
    return True


# ------------------------------------------------------------------------------ finding videos

SUFFIXES = (".3gp .asf .avi .f4v .flv .gif .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .vob "
            ".webm .wmv .y4m").split()
LEAVINGS = ("__macosx,@eadir,$recycle.bin,recycler,lost+found,#recycle,@recycle,"
            "system volume information").split(",")
TREE = f"""a --data-root is expected to look like
    VIDEOS/
        ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi        one folder a class, any depth
        Archery/v_Archery_g01_c01.avi                      {" ".join(SUFFIXES)}
    UCF-101 is UCF101.rar of https://www.crcv.ucf.edu/data/UCF101.php (`unrar x` or `bsdtar -xf`)"""


def find_videos(cfg):
    """Every video file of --data-root, links to folders followed, no folder read twice.

    Returns the root, names of files below it in order, and what was left out: {why: [names]}
    """
    root = Path(cfg.data_root).resolve()                # a class may be called after it
    names = []
    left_out = collections.defaultdict(list)
    if not cfg.data_root or not root.exists():
        raise SystemExit(f"--data-root {cfg.data_root!r} is not there; {TREE}")
    if root.is_file():
        return root.parent, [root.name], left_out
    folders = [root]                                    # grows on the way
    seen = set()
    for folder in folders:
        real = folder.resolve()
        if real in seen or not os.access(folder, os.R_OK | os.X_OK):
            left_out["folders linked twice or unreadable"].append(folder.name)
            continue
        seen.add(real)
        ours = written(folder)
        for path in sorted(folder.iterdir()):
            name = path.name
            suffix = path.suffix.lower()
            if name.startswith(".") or name.lower() in LEAVINGS:
                left_out["hidden or left by a system"].append(name)
            elif path.is_dir():
                folders.append(path)
            elif name in ours:
                left_out["written by a run of ours"].append(name)
            elif suffix in SUFFIXES:
                names.append(str(path.relative_to(root)))
            else:
                left_out[f"{suffix or 'other'} files"].append(name)
    return root, sorted(names), left_out


def class_of(path):
    """The class of a video: the name of its folder, on one line and in one Unicode form."""
    name = path.parent.name.encode(errors="replace").decode()
    return " ".join(unicodedata.normalize("NFC", name).split())


def group_of(name):
    """Group 1..25 of a video: from its UCF-101 name, else a hash of its path below the root."""
    told = re.search(r"_g(0[1-9]|1[0-9]|2[0-5])_c[0-9][0-9][^/\\]*$", name)
    if told:
        return int(told[1])
    return 1 + zlib.crc32(os.fsencode(name)) % 25


def split_groups(split):
    """The groups that train: all, train (8-25), test (1-7) as UCF-101's split 1, or 1-19,23."""
    named = {"all": "1-25", "train": "8-25", "test": "1-7"}
    groups = set()
    for part in named.get(split, split).split(","):
        first, _, last = part.partition("-")
        last = last or first
        digits = first.isdecimal() and last.isdecimal()
        if not digits or not 1 <= int(first) <= int(last) <= 25:
            raise SystemExit(f"--split {split}: all, train, test or groups of 1-25 such as 1-19,23")
        groups.update(range(int(first), int(last) + 1))
    return groups


def scan(root, names, index_path):
    """Look through every file once: how many frames decode, and where decoding may begin.

    What index.json knows is taken from there, where size and time of change agree.
    Returns {name: dict(size, mtime, frames, keys, error)}; frames is 0 where it cannot be read
    """
    before = read_checked(index_path) or {}
    index = dict(before)

    def look(name):
        try:
            about = os.stat(root / name)
            state = dict(size=about.st_size, mtime=about.st_mtime)
            if state.items() <= before.get(name, {}).items():
                return before[name]
            return state | survey(root / name)
        except Exception as problem:                    # hostile files raise anything
            return dict(frames=0, error=[repr(problem)])

    try:
        index.update(zip(names, in_threads(look, names, "scanning videos")))    # one by one, as they come
    except KeyboardInterrupt:
        raise SystemExit("stopped while scanning videos; the next run goes on from here")
    finally:
        if index != before:
            write_checked(index_path, index)            # what it knows of another folder stays
    return index


def in_threads(work, items, desc):
    """work(item) of every item, in order, under a bar; the decoder releases the interpreter lock.

    Ctrl-C does not wait for long films: these threads end with the process.
    """
    with ThreadPool() as pool:
        yield from progress(pool.imap(work, items), total=len(items), desc=desc)


# ------------------------------------------------------------------------------ exact seeking

def decode(path, damage, stamp=None):
    """The frames of a video in order; with `stamp`, from the key frame that has this time stamp.

    A damaged packet costs its own frames, and is noted in the list `damage`.

    Returns pairs: a frame, and how to show it (aspect of its pixels, display matrix or None)
    Raises:  whatever the decoder raises for a file that it cannot open
    """
    if not os.path.isfile(path):                        # opening a named pipe would wait for ever
        raise FileNotFoundError("not a regular file")
    # Names may hold colons and files may name addresses: both stay local files.
    with av.open(f"file:{path}", options={"protocol_whitelist": "file"}) as file:
        stream = file.streams.best("video")             # as players choose: no cover picture
        stream.codec_context.options = {"max_pixels": str(2 ** 25)}     # 8K: damaged headers lie
        stream.codec_context.thread_count = 1           # files are read side by side already
        aspect = stream.sample_aspect_ratio or 1
        if not 1 / 8 < aspect < 8:
            aspect = 1
        show = None
        if stamp is not None:
            file.seek(stamp, stream=stream)
        packets = file.demux(stream)
        while True:
            try:
                frames = next(packets).decode()
            except StopIteration:
                return
            except av.FFmpegError as error:
                damage.append(f"{type(error).__name__}: {error}")
                continue
            for frame in frames:
                if stamp in (None, frame.pts):
                    stamp = None                        # the key frame is found: all from here on
                    # Once a file: a frame whose side data was asked for stays in memory for long.
                    show = show or (aspect, frame.side_data.get("DISPLAYMATRIX"))
                    yield frame, show


def survey(path):
    """Count the frames that really decode, as headers lie; list where decoding may begin.

    Returns dict(frames, keys, error): the count, [[frame index, time stamp]] of key frames at least
    8 apart, and what was damaged
    Raises:  what the decoder raises
    """
    stamps = []
    keys = [[0, None]]
    damage = []
    for k, (frame, _) in enumerate(decode(path, damage)):
        stamps.append(frame.pts)
        if frame.key_frame and k >= keys[-1][0] + 8:    # nearer ones gain little
            keys.append([k, frame.pts])
    if not stamps:
        raise ValueError(f"no frame decodes {damage[:1]}")
    # With B-frames in avi stamps do not name frames; after damage numbers may depend on the start.
    if damage or stamps != sorted(set(stamps) - {None}):
        keys = keys[:1]
    return dict(frames=len(stamps), keys=keys, error=damage[:3])


def read_frames(path, indices, resolution, keys=((0, None),)):
    """Frames `indices` (ascending) of a video, exactly; begins at the last of `keys` before them.

    Shapes:  -> (len(indices), R, R, 3) uint8; every frame is shrunk before the next is decoded
    Raises:  Unreadable, also where the file ends too early
    """
    problem = "it ends too early"
    scaler = av.video.reformatter.VideoReformatter()    # PyAV's own has threads, which no fork survives
    nearest = max(key for key in keys if key[0] <= indices[0])
    for first, stamp in (nearest, (0, None)):           # 0: where a seek failed
        try:
            frames = zip(range(first, indices[-1] + 1), decode(path, [], stamp))
            pictures = [shrink(upright(frame, *show, scaler), resolution)
                        for k, (frame, show) in frames if k in indices]
            if len(pictures) == len(indices):
                return torch.stack(pictures)
        except Exception as error:                      # hostile files raise anything
            problem = repr(error)
    raise Unreadable(f"cannot read frames {indices[0]}..{indices[-1]} of {str(path)!r}: {problem} "
                     f"(av {av.__version__}; 17.1 or later is needed)")


def upright(frame, aspect, matrix, scaler):
    """A frame as a player shows it: square pixels, turned, mirrored. Shapes: -> (H, W, 3) uint8."""
    image = scaler.reformat(frame, round(frame.width * aspect), format="rgb24", threads=1).to_ndarray()
    if matrix is not None:
        a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5]      # x' = a x + c y, y' = b x + d y
        if abs(a) < abs(b):                             # a quarter turn
            image = image.swapaxes(0, 1)
            a = c
            d = b
        if a < 0:
            image = image[:, ::-1]
        if d < 0:
            image = image[::-1]
    return image


def shrink(image, resolution):
    """The square in the centre, brought to R pixels a side (bilinear, antialiased, whole levels).

    Shapes:  (H, W, 3) uint8 -> (R, R, 3) uint8
    Source:  choice (the paper names only the size): antialias as LARP, whose protocol it follows
    """
    H, W, _ = image.shape
    side = min(H, W)
    square = torch.from_numpy(image[(H - side) // 2:, (W - side) // 2:][:side, :side].copy())
    # As bytes: float takes 4 times as long.
    small = F.interpolate(square.movedim(-1, 0)[None], resolution, mode="bilinear", antialias=True)
    return small[0].movedim(0, -1)                      # (1, 3, R, R) -> (R, R, 3)


# ------------------------------------------------------------------------------ files and processes

class Unreadable(SystemExit, ValueError):
    """An end in one line, even when a loader process passes it on with a traceback for its text."""

    def __init__(self, told):
        super().__init__(told.strip().split("\n")[-1])


@contextlib.contextmanager
def told(what):
    """Whatever goes wrong in here ends the program in one line."""
    try:
        yield
    except Exception as error:
        raise SystemExit(f"{what} ({type(error).__name__}: {first_line(error)})") from error


def first_line(error):
    """What an error says, on one line."""
    return str(error).strip().split("\n")[0]


@contextlib.contextmanager
def carry_on(path):
    """A file that cannot be written is told in a line, and training goes on."""
    try:
        yield
    except (OSError, SystemExit) as error:
        say(f"could not write {path} ({error}); what was there stays", sys.stderr)


def say(text, file=None):
    """A line above the bar, in a log at once; where even the log is full, training goes on."""
    with contextlib.suppress(OSError), tqdm.external_write_mode(file):
        print(text, file=file, flush=True)


def write_file(path, blob):
    """Write a whole file or none of it: beside its name first, then renamed."""
    part = path.with_name(f".{os.getpid()}.part")
    with told(f"cannot write {path}"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "wb") as file:
                file.write(blob)
                file.flush()
                os.fsync(file.fileno())                 # or a power cut leaves it empty
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def write_checked(path, about):
    """A dict as .json with a checksum, so that a damaged or foreign file is never trusted."""
    text = json.dumps(about)
    write_file(path, f'{{"data.py": {zlib.crc32(text.encode())},\n"about": {text}}}\n'.encode())


def read_checked(path):
    """What `write_checked` wrote there, or None. Raises: SystemExit where it is damaged or foreign."""
    if not path.exists():
        return None
    with told(f"{path} is damaged or not ours: move it away"):
        found = json.loads(path.read_text())
        if found["data.py"] != zlib.crc32(json.dumps(found["about"]).encode()):
            raise ValueError("its checksum is that of another text")
        return found["about"]


def append(path, rows, done):
    """Write `rows` behind the first `done` rows of an .npy, over whatever a stopped run left there.

    Ordinary writes: a full disk is an OSError, where a memory map would end the process with SIGBUS
    """
    header = np.lib.format.header_data_from_array_1_0(rows)
    header["shape"] = (done + len(rows), *rows.shape[1:])
    if not done:
        path.unlink(missing_ok=True)                    # others may still read what stood there
    with open(path, "r+b" if done else "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)          # of one length for any count
        file.seek(done * rows[0].nbytes, os.SEEK_CUR)
        if done and file.tell() > os.path.getsize(path):
            raise OSError("it is shorter than its .json says; move both away")
        file.truncate()
        file.write(rows.tobytes())


def file_hash(path):
    """sha256 of a file. Returns hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_of(path):
    """The text of a file; empty where there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def written(folder):
    """Names of the files in a folder that `write_ours` wrote, in this order."""
    return text_of(folder / ".written").split("\n")


def write_ours(path, blob):
    """Write a picture, video or page, and note its name in the folder's `.written`.

    So no run trains on it, and a file that is not noted there is never replaced.
    """
    if path.name not in written(path.parent):
        if path.exists():
            raise SystemExit(f"{path} is not one of ours: move it away, or choose another folder")
        with told(f"cannot write {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path.parent / ".written", "a", encoding="utf-8") as file:
                file.write(path.name + "\n")
    write_file(path, blob)


@contextlib.contextmanager
def claim(folder):
    """Make a run's folder and hold it, so that a second run into it ends in one line."""
    with told(f"cannot write {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a")
    with lock:                                          # the system lets go when the process ends
        try:
            import fcntl
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"another run writes into {folder}; choose another --out")
        except (ImportError, OSError):                  # Windows, or a network disk without locks
            pass
        yield


def ranks():
    """(rank, world): which process this is, of how many, as torchrun says; (0, 1) without it."""
    try:
        rank = int(os.environ.get("RANK") or 0)
        world = int(os.environ.get("WORLD_SIZE") or 1)
        if 0 <= rank < world:
            return rank, world
    except ValueError:
        pass
    raise SystemExit("RANK and WORLD_SIZE are not as torchrun sets them: unset both")


def alone(script):
    """One line and exit 1 where torchrun started several processes of a script that runs in one."""
    if ranks()[1] > 1:
        raise SystemExit(f"{script} runs in one process; start it with python, not torchrun (or unset WORLD_SIZE)")


def progress(iterable=None, quiet=False, **settings):
    """A tqdm bar on a terminal; none in a log file, with `quiet` or where TQDM_DISABLE is set."""
    disable = quiet or os.environ.get("TQDM_DISABLE") or None           # None: where there is no terminal
    return tqdm(iterable, disable=disable, **settings)


def free_memory(device):
    """Bytes that are free on a device; infinite where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    told = re.search(r"MemAvailable: *(\d+)", text_of(Path("/proc/meminfo")))
    return int(told[1]) * 1024 if told else math.inf


def load_lpips(name, device):
    """LPIPS (arXiv 1801.03924), frozen; None for "none". Raises: SystemExit without weights."""
    if name == "none":
        return None
    import lpips                    # takes seconds, and most runs do not need it
    with told(f"no {name} weights for LPIPS: put torchvision's file into {torch.hub.get_dir()}/checkpoints, "
              "or choose another --lpips-net, or do without it (stage 1: --lpips-weight 0; fvd.py: "
              "--lpips-net none)"):
        return lpips.LPIPS(net=name, verbose=False).to(device).eval().requires_grad_(False)


# ------------------------------------------------------------------------------ pictures

def enlarge(video):
    """A whole number of times as large, smoothly, 128 pixels at most. Shapes: (..., 3, H, W)."""
    scale = 128 // max(video.shape[-2:])
    if scale < 2:
        return video
    flat = F.interpolate(video.flatten(0, -4), scale_factor=scale, mode="bicubic")
    return flat.clamp(-1, 1).unflatten(0, video.shape[:-3])


def tile(videos, columns, labels=()):
    """Videos side by side on white, each below its label; small ones are enlarged to 128 pixels.

    Shapes:  videos (n, T, 3, H, W) in [-1, 1], labels n strings or none -> (T, 3, H', W')
    """
    videos = enlarge(videos.cpu())
    W = videos.shape[-1]
    top = W * 3 // 16 if labels else 0
    missing = -len(videos) % columns                    # cells of the last row, which stay white
    videos = F.pad(videos, (2, 2, top + 2, 2, 0, 0, 0, 0, 0, missing), value=1.0)
    font = ImageFont.load_default(W // 9)               # to be read on a phone
    for video, label in zip(videos, labels):
        paper = Image.new("RGB", (W, top), "white")
        ImageDraw.Draw(paper).text((0, top), label, "black", font, "ld")        # cut where it is full
        video[..., 2:top + 2, 2:-2] = from_uint8(np.array(paper))
    rows = [torch.cat(list(row), -1) for row in videos.split(columns)]              # (T, 3, h, W') each
    return torch.cat(rows, -2)


def save_video(path, video, fps=8):
    """Write one video as mp4 or gif, or its first frame as png, by the suffix; for eyes only.

    Small frames are enlarged to 128 pixels. All frames of a gif share one palette, or what stands
    still would shimmer.
    Shapes:  video (T, 3, H, W) in [-1, 1]; mp4 takes even sides
    Units:   a gif counts hundredths of a second, and browsers play less than two of them as ten:
             above 50 frames a second some are left out, and the rounded delays keep their sum
    Raises:  SystemExit in one line for a full disk and for a file that is not ours
    """
    frames = to_uint8(enlarge(video))                                          # (T, H, W, 3)
    if path.suffix == ".gif":
        step = math.ceil(fps / 50)
        starts = np.arange(0, len(frames) + step, step) / fps
        delays = 10 * np.diff(np.round(100 * starts))                               # milliseconds
        frames = frames[::step]
        below = Image.fromarray(np.concatenate(frames)).quantize().convert("RGB")
        frames = np.array(below).reshape(frames.shape)
        blob = iio.imwrite("<bytes>", frames, extension=".gif", save_all=True,      # one frame, too
                           duration=delays.tolist(), loop=0)
    elif path.suffix == ".png":
        blob = iio.imwrite("<bytes>", frames[0], extension=".png")
    else:
        blob = iio.imwrite("<bytes>", frames, extension=".mp4", plugin="pyav", codec="libx264", fps=fps)
    write_ours(path, blob)


# ------------------------------------------------------------------------------ the page of a run

def write_page(folder, title, settings):
    """index.html of a run's folder: sliders, videos, pictures, curves of log.jsonl, settings.

    It opens from the disk without a server, and names only files that are there and ours.
    """
    rows = []
    for line in text_of(folder / "log.jsonl").splitlines():
        with contextlib.suppress(ValueError):           # a stop may cut the last line off
            rows.append(json.loads(line))
    files = [name for name in reversed(written(folder)) if (folder / name).is_file()]
    about = dict(title=title, settings=settings, files=files, rows=rows)
    text = json.dumps(about, default=str).replace("<", "\\u003c")     # names may hold </script>
    write_ours(folder / "index.html", PAGE.replace("DATA", text).encode())


PAGE = r"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>run</title>
<style>
:root { color-scheme: light dark; --paper: #faf9f7; --card: #fff; --ink: #1c1c1e; --faint: #6c6b70;
        --line: #e2e0db; --mark: #2563eb }
@media (prefers-color-scheme: dark) { :root {
        --paper: #121214; --card: #1b1b1f; --ink: #ededf0; --faint: #9b9aa2; --line: #2d2d33; --mark: #7aa7ff } }
* { box-sizing: border-box; margin: 0 }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 72rem; background: var(--paper);
       color: var(--ink); font: 16px/1.45 system-ui, sans-serif; overflow-wrap: anywhere }
h2 { margin: 2.2rem 0 .8rem; font-size: 1.1rem }
p, figcaption, th, small { color: var(--faint); font-size: .85rem }
section:not(:has(:nth-child(2))) { display: none }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)) }
#films .grid { grid-template-columns: repeat(auto-fill, minmax(min(9rem, 44%), 1fr)) }
#pictures .grid { grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)) }
#pictures figure:first-child { grid-column: 1 / -1 }
img, video, #cell { display: block; max-width: 100%; max-height: 90vh; border-radius: 6px }
.card, table { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .7rem .9rem }
.card b { float: right }
.card small { display: flex; justify-content: space-between }
svg { display: block; width: 100%; height: 7rem; touch-action: pan-y; cursor: crosshair; overflow: visible }
svg * { vector-effect: non-scaling-stroke; fill: none; stroke: var(--line) }
svg .line { stroke: var(--mark); stroke-width: 1.8; stroke-linejoin: round }
table { width: 100%; border-spacing: 0 }
th { text-align: left; font-weight: 400; white-space: nowrap; padding-right: 1rem }
td { width: 100% }
label { display: grid; grid-template-columns: 8rem 1fr; align-items: center; max-width: 26rem }
input { accent-color: var(--mark); width: 100%; height: 2.2rem }
</style>
<h1></h1><p></p>
<section id="sliders"><h2>From one network to another, by hand</h2></section>
<section id="films"><h2>Videos</h2></section>
<section id="pictures"><h2>Newest pictures</h2></section>
<section id="curves"><h2>Curves</h2></section>
<section id="settings"><h2>Settings</h2></section>
<script>
const run = DATA
const part = id => document.getElementById(id)
const every = Math.ceil(run.rows.length / 500)          // a screen has no room for more points
const rows = run.rows.filter((row, i) => (run.rows.length - 1 - i) % every == 0)
const steps = rows.map((row, i) => row.step ?? i)
const short = value => String(+value.toPrecision(5))
function add(parent, tag, attributes = {}, text = "") {
  const space = tag == "svg" ? "http://www.w3.org/2000/svg" : parent.namespaceURI
  const made = parent.appendChild(document.createElementNS(space, tag))
  for (const name in attributes) made.setAttribute(name, attributes[name])
  made.append(text)
  return made
}
document.title = document.querySelector("h1").textContent = run.title
document.querySelector("p").textContent = [...steps.slice(-1).map(step => `step ${step}`), document.lastModified].join(", ")
function figures(id, names, tag, attributes, most) {
  const grid = names.length && add(part(id), "div", { class: "grid" })
  for (const name of names.slice(0, most)) {
    const figure = add(grid, "figure")
    add(figure, tag, { ...attributes, src: encodeURIComponent(name) }).muted = true
    add(figure, "figcaption", {}, name)
  }
  if (names.length > most) add(part(id), "p", {}, `and ${names.length - most} more in this folder`)
}
const films = run.files.filter(name => name.endsWith(".mp4")).sort()
const pictures = run.files.filter(name => /\.(gif|png)$/.test(name) && name != "interp_sheet.png")
figures("films", films, "video", { autoplay: "", loop: "", muted: "", playsinline: "" }, 24)
figures("pictures", pictures, "img", { loading: "lazy", alt: "" }, 6)
function curve(parent, key) {
  const points = rows.map((row, i) => [steps[i], row[key]]).filter(point => Number.isFinite(point[1]))
  const [low, high] = [Math.min, Math.max].map(end => end(...points.map(point => point[1])))
  const scale = low > 0 && high > 50 * low ? Math.log : value => value
  const x = ([step]) => 300 * (step - points[0][0]) / (points.at(-1)[0] - points[0][0] || 1)
  const y = ([, value]) => 100 * (scale(high) - scale(value)) / (scale(high) - scale(low) || 1)
  const card = add(parent, "div", { class: "card" })
  const value = add(card, "b")
  add(card, "span", {}, key)
  add(card, "small", {}, short(high) + (scale == Math.log ? ", log scale" : ""))
  const svg = add(card, "svg", { viewBox: "0 0 300 100", preserveAspectRatio: "none" })
  add(svg, "path", { d: "M0,0H300M0,50H300M0,100H300" })
  add(svg, "path", { class: "line", d: "M" + points.map(point => [x(point), y(point)]).join("L") })
  const at = add(svg, "path", { class: "line" })
  const where = add(add(card, "small", {}, short(low)), "span")
  function show(point, line) {
    value.textContent = short(point[1])
    where.textContent = `step ${point[0]}`
    at.setAttribute("d", line ? `M${x(point)},0V100` : "")
  }
  svg.onpointermove = event => {
    const goal = 300 * (event.clientX - svg.getBoundingClientRect().left) / svg.clientWidth
    const far = point => Math.abs(x(point) - goal)
    show(points.reduce((best, point) => far(point) < far(best) ? point : best), true)
  }
  svg.onpointerleave = () => show(points.at(-1), false)
  svg.onpointerleave()
}
const keys = new Set(rows.flatMap(row => Object.keys(row).filter(key => key != "step" && Number.isFinite(row[key]))))
const grid = keys.size && add(part("curves"), "div", { class: "grid" })
keys.forEach(key => curve(grid, key))
const table = Object.keys(run.settings).length && add(part("settings"), "table")
for (const key in run.settings) {
  const row = add(table, "tr")
  add(row, "th", {}, key)
  add(row, "td", {}, run.settings[key])
}
const image = new Image()
image.src = run.files.find(name => name == "interp_sheet.png") ?? ""
image.onload = () => {                                  // square cells: 25 lambdas across, the frames down
  const columns = 25, frames = Math.round(columns * image.height / image.width)
  const cell = add(part("sliders"), "div", { id: "cell", style: `width: 26rem; aspect-ratio: 1;
    background: url(interp_sheet.png) 0 0 / ${100 * columns}% ${100 * frames}%` })
  const slider = (name, count) =>
    add(add(part("sliders"), "label", {}, name), "input", { type: "range", max: count - 1, value: 0 })
  const lambda = slider("lambda", columns), time = slider("time", frames)
  const place = input => `${100 * input.value / (input.max || 1)}% `
  const show = () => cell.style.backgroundPosition = place(lambda) + place(time)
  const playing = setInterval(() => { time.value = (+time.value + 1) % frames; show() }, 125)
  lambda.oninput = show
  time.oninput = () => { clearInterval(playing); show() }
}
</script>
"""


if __name__ == "__main__":
    main()
