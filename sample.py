"""From checkpoints to videos: generate, interpolate, look between and beyond the frames, predict, compress.

    python sample.py                            # 16 videos: out/samples/*.mp4, samples.gif, samples.png, samples.npz
    python sample.py --interp                   # and the way from one video's weights to another's
    python sample.py --time-interp 8            # and 8 frames for every trained one
    python sample.py --extrapolate              # and as many frames again beyond the last trained one
    python sample.py --n 2048 --out out/eval    # for fvd.py; stopped and started again, it goes on
    python sample.py --overview                 # and some clips over their reconstructions over generated ones
    python sample.py --reconstruct --n 256      # original.npz and reconstruction.npz of held-out clips, for fvd.py
    python sample.py --predict clip.mp4         # future of a video (nerv_dit.py --condition frames, image or edge);
                                                # without --predict such a DiT answers n clips that did not train
    python sample.py --interp --video-a a.mp4 --video-b b.mp4       # between two real videos
    python sample.py --compress clip.mp4 --bits 8                   # a video as a few kilobytes: clip.nerv
    python sample.py --decompress out/samples/clip.nerv             # and back: clip.nerv.mp4, clip.nerv.gif
    python sample.py --weights assets/toy       # any of these but --predict with the weights that came along
    python sample.py --bench --model S          # how fast this machine runs the paper's sizes: a table, bench.json

Letters: n videos, T frames, H = W pixels, N weight tokens, d channels a token. lambda: 1 is video a, 0 is video b.
Ranges:  pixels are in [-1, 1] until they are written; samples.npz holds uint8. mp4 and gif are lossy, for eyes only.
"""
import heapq
import json
import math
import os
import re
import time
import zipfile
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import nerv_dit
import nerv_vae
from data import (build_dataset, condition_video, count_frames, degrade, parse_config, read_clip, save_video, tile,
                  to_uint8)
from generative_nerv import GenerativeNeRV, flops, positional_embedding, render
from nerv_dit import file_hash, load_dit, sample_tokens
from nerv_vae import load_vae, pick_device, psnr_from_mse, save_checkpoint


@dataclass(frozen=True)
class Config:
    """Settings of sample.py; sizes, classes and data come from the checkpoints."""

    # what
    n: int = 16                     # videos
    classes: str = ""               # names or numbers, separated by commas, taken in turn; empty: all classes in turn
    interp: bool = False            # interpolate the weights of two videos (paper Sec. 4.5.2, Fig. A2)
    video_a: str = ""               # a video file to interpolate from, or in time, not the first generated video
    video_b: str = ""               # a video file to interpolate to, not the last generated video
    time_interp: int = 0            # frames for every trained frame (paper Sec. 4.5.1, Fig. A1: 8)
    extrapolate: bool = False       # as many frames again beyond the last trained one (paper Sec. 4.5.1)
    overview: bool = False          # clips over their reconstructions over generated ones of the same classes
    reconstruct: bool = False       # encode and decode n held-out clips instead of generating
    predict: str = ""               # a video file to continue, animate or redraw (Sec. 4.3, E.7)
    compress: str = ""              # a video file whose first clip becomes a .nerv file (NeRV-Enc A.4)
    bits: int = 8                   # 4|5|6|7|8|32: of a number in the .nerv file; 32 keeps float32
    decompress: str = ""            # a .nerv file to play
    export: str = ""                # write NAME-vae.pt and NAME-dit.pt: both stages in half precision, to hand on
    # how
    sampler: str = "auto"           # auto|ddpm|ddim: auto is as the DiT was configured
    sample_steps: int = 0           # 0: as the DiT was configured
    guidance: float = 0.0           # 1 is off; 0: as the DiT was configured
    batch: int = 0                  # videos at once; 0: 16, and 1 with --bench (paper E.1)
    seed: int = 0                   # fixes the noise of every video
    compile: bool = True            # on CUDA: the sampling step compiled, captured once as a graph and replayed
    # where
    dit: str = "out/dit/ckpt.pt"    # checkpoint of nerv_dit.py
    vae: str = ""                   # checkpoint of nerv_vae.py; empty: the DiT's; out/vae/ckpt.pt where none takes part
    weights: str = ""               # NAME of exported ones, in place of --dit and --vae; here: assets/toy
    data_root: str = ""             # folder of videos, if they have moved since the tokenizer was trained
    out: str = "out/samples"        # folder that everything is written to
    fps: int = 8                    # of gif and mp4
    device: str = "auto"            # auto|cpu|cuda: what computes; auto: CUDA where there is one
    # how fast
    bench: bool = False             # time the paper's sizes with random weights (Tables A2, A3, E.16); nothing is read
    model: str = "S"                # S|B|L: decoder that --bench times
    resolution: int = 128           # 128|256: pixels of the clips that --bench times


# ---------------------------------------------------------------------------------------------- pieces

def pick_labels(wanted, names, n):
    """n class numbers from "ring sliding,3", in turn. Raises SystemExit that lists the classes."""
    chosen = []
    for word in [w.strip() for w in wanted.split(",") if w.strip()] or range(len(names)):
        if word in names:
            chosen.append(names.index(word))
        elif str(word).isdigit() and int(word) < len(names):
            chosen.append(int(word))
        else:
            listed = ", ".join(f"{i} {c}" for i, c in enumerate(names))
            raise SystemExit(f"no class {word!r}; the classes are {listed}")
    return [chosen[i % len(chosen)] for i in range(n)]


def noise_for(first, count, shape, seed):
    """Starting noise of videos first..first+count-1; each has its own seed, so batches may be of any size."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + i))
                        for i in range(first, first + count)])                      # (count, N, d)


def file_tokens(path, vae, device):
    """Mean tokens of the first clip of a video file. Shapes: -> (N, d), clip (T, 3, H, W)."""
    c = vae.cfg
    try:
        stride = c.stride or (count_frames(path) - 1) // max(c.frames - 1, 1)
        clip = read_clip(path, 0, c.frames, stride, c.resolution)
    except Exception as error:                          # whatever a hostile file makes the decoder raise
        raise SystemExit(f"{path} has no readable clip of {c.frames} frames at stride {c.stride} ({error})") from error
    return vae.encode(clip[None].to(device))[0][0], clip


class VideoStore:
    """Videos on their way into an .npz, written batch by batch, so that memory stays flat and a stop loses nothing.

    `path`.part.npy grows in place and `path`.part.json says how far it is; `close` packs both into `path`.
    """

    def __init__(self, path, shape, settings):
        self.path, self.part = path, path.with_suffix(".part.npy")
        self.note, self.settings, self.done = path.with_suffix(".part.json"), settings, 0
        if self.part.exists() and self.note.exists():
            note = json.loads(self.note.read_text())
            if note["settings"] == settings and note["shape"] == list(shape):
                self.done = note["done"]
        if not self.done:
            self.note.unlink(missing_ok=True)           # it speaks of the file that is overwritten now
        self.shape, mode = list(shape), "r+" if self.done else "w+"
        self.videos = np.lib.format.open_memmap(self.part, mode, np.uint8, None if self.done else tuple(shape))

    def add(self, videos):
        """Append videos (k, T, 3, H, W) in [-1, 1]."""
        self.videos[self.done:self.done + len(videos)] = to_uint8(videos)
        self.videos.flush()
        self.done += len(videos)
        fresh = self.note.with_suffix(".new")
        fresh.write_text(json.dumps(dict(settings=self.settings, shape=self.shape, done=self.done)))
        os.replace(fresh, self.note)

    def close(self, labels):
        """Pack videos (n, T, H, W, 3) uint8, labels (n,) and the settings into the .npz; remove the parts."""
        del self.videos
        new = self.path.with_suffix(".part")
        with zipfile.ZipFile(new, "w") as archive:
            archive.write(self.part, "videos.npy")
            for name, value in dict(labels=np.asarray(labels), settings=np.array(json.dumps(self.settings))).items():
                with archive.open(name + ".npy", "w") as member:
                    np.lib.format.write_array(member, value, allow_pickle=False)
        os.replace(new, self.path)
        self.part.unlink()
        self.note.unlink()


def draw_tokens(cfg, dit, cond, first, how):
    """Tokens of videos first, first + 1, ..: one for each row of cond (k,) or (k, N, d). Shapes: -> (k, N, d)."""
    noise = noise_for(first, len(cond), dit.token_mean.shape, cfg.seed).to(cond.device)
    return sample_tokens(dit, cond, noise, how["sampler"], how["sample_steps"], how["guidance"],
                         cfg.seed * 1_000_003 + first, progress=cfg.n <= cfg.batch)


def clip_shape(vae):
    """(T, H, W, 3) of a clip in an .npz."""
    return vae.cfg.frames, vae.cfg.resolution, vae.cfg.resolution, 3


def clip_settings(vae):
    """What a measurement must know about the clips of a tokenizer, whose .path and .sha256 main has set."""
    c = vae.cfg
    return dict(dataset=c.dataset, classes=vae.classes, frames=c.frames, stride=c.stride, resolution=c.resolution,
                split=c.split, vae_sha256=vae.sha256, vae_step=vae.step)


def load_videos(path, count):
    """The first videos of an .npz of ours as floats. Shapes: -> (count, T, 3, H, W) in [-1, 1].

    The header is believed only where it agrees with the file's size; all is read once, so that zip's checksum counts.
    Raises: SystemExit for a file that is truncated, altered or not of ours
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open("videos.npy") as file:
            info = archive.getinfo("videos.npy")
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > os.path.getsize(path):
                raise ValueError("videos.npy is not stored as it is")
            np.lib.format.read_magic(file)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            if fortran or dtype != np.uint8 or len(shape) != 5 or shape[4] != 3 or min(shape) < 1 or (
                    math.prod(shape) != info.file_size - file.tell()):
                raise ValueError(f"videos.npy claims to be {dtype} of {shape}")
            shape = (min(count, shape[0]), *shape[1:])
            videos = np.frombuffer(file.read(math.prod(shape)), np.uint8).reshape(shape)
            while file.read(1 << 20):                   # to the end, where zipfile compares the checksum
                pass
    except Exception as error:                          # whatever a hostile file makes the readers raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SystemExit(f"{path} is not a whole .npz of sample.py ({reason}); make it again") from error
    return torch.tensor(videos).movedim(-1, 2).float() / 127.5 - 1                  # (count, T, 3, H, W)


def film_strips(videos, labels):
    """One row a video, time from left to right; labels (n * T). Shapes: (n, T, 3, H, W) -> (1, 3, H', W')."""
    return tile(videos.flatten(0, 1)[:, None], videos.shape[1], labels)


# ---------------------------------------------------------------------------------- .nerv files; skip at first

def quantise(tokens, bits):
    """Each number becomes the nearest of 2^bits that lie evenly between the smallest and the largest.

    Shapes:  tokens (n,) float -> levels (n,) uint8, low, scale; levels * scale + low is at most scale / 2 off
    Source:  NeRV-Enc A.4, Eq. 2. Choice: one range for all tokens of a video; arithmetic in float64
    """
    x = np.asarray(tokens, np.float64)
    low, scale = float(x.min()), float(x.max() - x.min()) / (2 ** bits - 1)
    return np.round((x - low) / (scale or 1)).astype(np.uint8), low, scale


def code_lengths(counts):
    """Bits of each symbol's Huffman code, a byte each, 0 for one that never occurs. Shapes: counts (n,) -> n bytes."""
    lengths, heap = [0] * len(counts), [(int(c), [s]) for s, c in enumerate(counts) if c]
    heapq.heapify(heap)
    if len(heap) == 1:
        lengths[heap[0][1][0]] = 1                      # a lone symbol still takes a bit, or its number would be lost
    while len(heap) > 1:                                # the two rarest groups become one, and a bit longer each
        (a, left), (b, right) = heapq.heappop(heap), heapq.heappop(heap)
        for symbol in left + right:
            lengths[symbol] += 1
        heapq.heappush(heap, (a + b, left + right))
    return bytes(lengths)


def canonical_codes(lengths):
    """{symbol: code}: each code is the one before plus one, shorter codes first, so that lengths say all."""
    codes, code, last = {}, 0, 0
    for length, symbol in sorted((length, s) for s, length in enumerate(lengths) if length):
        code <<= length - last
        if code >> length:
            raise ValueError("no code has such lengths")
        codes[symbol], code, last = code, code + 1, length
    return codes


def huffman_encode(symbols, lengths):
    """Shapes: symbols (n,) int, lengths bytes -> bytes, the last one filled up with zeros."""
    words = {s: f"{code:0{lengths[s]}b}" for s, code in canonical_codes(lengths).items()}
    bits = "".join(words[s] for s in symbols.tolist())
    return np.packbits(np.frombuffer(bits.encode(), np.uint8) - ord("0")).tobytes()


def huffman_decode(payload, lengths, count):
    """The inverse. Shapes: bytes, bytes -> (count,) uint8. Raises: ValueError where it cannot be one."""
    symbols = {(lengths[s], code): s for s, code in canonical_codes(lengths).items()}
    if count > 8 * len(payload):                        # each takes a bit at least: known before memory is taken
        raise ValueError("the payload is too short")
    found, n, length, code, longest = np.empty(count, np.uint8), 0, 0, 0, max(lengths)
    for byte in payload:
        for shift in range(7, -1, -1):
            length, code = length + 1, 2 * code + (byte >> shift & 1)
            if (length, code) in symbols:
                found[n] = symbols[length, code]
                n, length, code = n + 1, 0, 0
                if n == count:
                    return found
            elif length >= longest:
                raise ValueError("the payload holds a code that is not in the table")
    raise ValueError("the payload is too short")


MAGIC, LARGEST = b"NeRV\x01", 1 << 22                   # its last byte: version 1; no token set of ours is near 4 MiB


def pack_tokens(tokens, bits, **header):
    """Numbers (n,) of a video's tokens as the bytes of a .nerv file. Its parts in order, integers little-endian:

    magic, 5 bytes | length of the header, 4 bytes | header, JSON: count, bits, low, scale and what the caller adds |
    below 32 bits: 2^bits code lengths, a byte each | payload: Huffman codes, or float32 | CRC-32 of all that, 4 bytes
    """
    tokens, low, scale = tokens.float().cpu().numpy(), 0.0, 0.0
    body = tokens.astype("<f4").tobytes()
    if bits < 32:
        levels, low, scale = quantise(tokens, bits)
        lengths = code_lengths(np.bincount(levels, minlength=2 ** bits))
        body = lengths + huffman_encode(levels, lengths)
    head = json.dumps(dict(count=len(tokens), bits=bits, low=low, scale=scale, **header)).encode()
    blob = MAGIC + len(head).to_bytes(4, "little") + head + body
    return blob + zlib.crc32(blob).to_bytes(4, "little")


def unpack_tokens(blob):
    """Header and numbers (n,) float32 of the bytes of a .nerv file. Raises: ValueError and its like for any other."""
    if blob[:len(MAGIC)] != MAGIC:
        raise ValueError("it does not begin like one")
    if zlib.crc32(blob[:-4]) != int.from_bytes(blob[-4:], "little"):
        raise ValueError("its checksum is wrong: truncated or altered")
    start = len(MAGIC) + 4 + int.from_bytes(blob[5:9], "little")
    header, body = json.loads(blob[9:start]), blob[start:-4]
    count, bits = header["count"], header["bits"]
    if any(type(v) is not int or v < 1 for v in (count, bits)) or bits > 8 and bits != 32:
        raise ValueError("its header has impossible sizes")
    if bits == 32:
        values = np.frombuffer(body, "<f4").astype(np.float32)
    else:
        levels = huffman_decode(body[2 ** bits:], body[:2 ** bits], count)
        values = (levels * float(header["scale"]) + float(header["low"])).astype(np.float32)
    if len(values) != count or not np.isfinite(values).all():
        raise ValueError("its tokens are not numbers")
    return header, torch.from_numpy(values)


def read_nerv(path):
    """Header and tokens of a .nerv file, parsed as data alone. Raises: SystemExit that says what is wrong with it."""
    try:
        if os.path.getsize(path) > LARGEST:
            raise ValueError("it is larger than any token set")
        with np.errstate(over="ignore", invalid="ignore"):
            return unpack_tokens(Path(path).read_bytes())
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise SystemExit(f"{path} cannot be read as a .nerv file ({error}); make it again with --compress") from error


# ---------------------------------------------------------------------------------------------- what the flags do

def unseen_clips(cfg, vae):
    """The clips kept out of training; where none were, all of --data-root. And what to call them."""
    # Stage 1 left its index of the videos beside its checkpoint.
    about = replace(vae.cfg, data_root=cfg.data_root or vae.cfg.data_root, out=str(vae.path.parent))
    clips = build_dataset(about, held_out=True)
    return (clips, "held-out") if len(clips) else (build_dataset(about), "not held-out")


def thumbnails(video, floats):
    """What as many numbers as the tokens keep without any network: smaller copies, enlarged again.

    For each number of frames t up to T, means over boxes of space and time, t x r x r with the largest r that fits;
    then back by trilinear interpolation. t = 1 is the mean frame.
    Shapes: video (k, T, 3, R, R) -> {"t x r x r": (k, T, 3, R, R)}
    """
    T, R, x = video.shape[1], video.shape[-1], video.transpose(1, 2)                # (k, 3, T, R, R)
    sides = {t: min(R, math.isqrt(floats // (3 * t))) for t in range(1, T + 1)}
    small = {(t, r): F.adaptive_avg_pool3d(x, (t, r, r)) for t, r in sides.items() if r}            # (k, 3, t, r, r)
    return {f"{t} x {r} x {r}": F.interpolate(thumb, x.shape[2:], mode="trilinear").transpose(1, 2)
            for (t, r), thumb in small.items()}


def reconstruct(cfg, vae, device, out):
    """Originals and reconstructions of clips that did not train, as a pair of .npz; PSNR beside that of thumbnails."""
    clips, which = unseen_clips(cfg, vae)
    order = np.random.default_rng(cfg.seed).permutation(len(clips))[:cfg.n]
    kinds, shape = ("original", "reconstruction"), (len(order), *clip_shape(vae))
    settings = dict(clip_settings(vae), pair=f"{vae.sha256[:12]}-{cfg.seed}-{len(order)}", which=which, seed=cfg.seed)
    stores = [VideoStore(out / f"{kind}.npz", shape, dict(kind=kind, **settings)) for kind in kinds]
    labels, psnr, done = [int(clips.labels[i]) for i in order], {}, min(store.done for store in stores)
    for store in stores:
        store.done = done
    for first in tqdm(range(done, len(order), cfg.batch), desc="reconstructing", unit="batch"):
        video = torch.stack([clips[int(i), int(i)][0] for i in order[first:first + cfg.batch]])     # (k, T, 3, H, W)
        recon = vae.play(vae.encode(degrade(video.to(device), vae.cfg.degrade))[0])                 # (k, T, 3, H, W)
        for name, code in dict(tokens=recon, **thumbnails(video, vae.decoder.used.sum().item())).items():
            psnr.setdefault(name, []).extend(psnr_from_mse((code - video).square().mean((2, 3, 4))).mean(1).tolist())
        stores[0].add(video)
        stores[1].add(recon)
    for store in stores:
        store.close(labels)
    a, b = (load_videos(out / f"{kind}.npz", 8) for kind in kinds)                  # (8, T, 3, H, W) each
    labels = [name for name in (*kinds, "difference") for _ in a]
    save_video(out / "reconstruction.gif", tile(torch.cat([a, b, (a - b).abs() - 1]), len(a), labels), cfg.fps)
    if psnr:
        mean = {name: float(np.mean(values)) for name, values in psnr.items()}
        still, *boxes = list(mean)[1:]
        best = max(boxes or [still], key=mean.get)
        print(f"{len(psnr['tokens'])} {which} clips: PSNR {mean['tokens']:.2f} dB (mean over frames, then clips)\n"
              f"as many numbers as the mean frame, {still}: {mean[still]:.2f} dB; as a thumbnail, {best}: "
              f"{mean[best]:.2f} dB")
    print(f"wrote {out}/original.npz, reconstruction.npz and reconstruction.gif (original, reconstruction, difference)")


def generate(cfg, vae, dit, device, out, how):
    """n videos into samples.npz, and the first ones as mp4, gif and sheet. Returns the ends of --interp, (2, N, d).

    From classes in turn; or, where the DiT is told of a clip, each from another clip that did not train.
    """
    none = len(dit.class_names)
    labels = pick_labels(cfg.classes, dit.class_names, cfg.n) if dit.cfg.condition == "class" else [none] * cfg.n
    cond, which = torch.tensor(labels, device=device), ""                           # (n,)
    if dit.by_tokens:
        clips, which = unseen_clips(cfg, vae)
        which = f" of {which} clips"
        order = np.resize(np.random.default_rng(cfg.seed).permutation(len(clips)), cfg.n)           # (n,), in turn
    settings = dict(clip_settings(vae), kind="samples", n=cfg.n, seed=cfg.seed, batch=cfg.batch, asked=cfg.classes,
                    labels_drawn="in turn", dit_sha256=file_hash(cfg.dit), dit_step=dit.step,
                    condition=dit.cfg.condition + which, **how)
    store = VideoStore(out / "samples.npz", (cfg.n, *clip_shape(vae)), settings)

    def condition(first, count):                        # of videos first, first + 1, ...
        if not dit.by_tokens:
            return cond[first:first + count]                                        # (k,)
        video = torch.stack([clips[int(v), first + i][0] for i, v in enumerate(order[first:first + count])])
        return condition_tokens(vae, dit, video.to(device))                         # (k, N, d)

    for first in tqdm(range(store.done, cfg.n, cfg.batch), desc="generating", unit="batch", disable=cfg.n <= cfg.batch):
        store.add(vae.play(draw_tokens(cfg, dit, condition(first, cfg.batch), first, how)))
    store.close(labels)
    for old in out.glob("[0-9][0-9][0-9]_*.mp4"):       # of a run before: others would take them for this one's
        old.unlink()
    videos = load_videos(out / "samples.npz", 64)
    names = [dit.class_names[label] if label < len(dit.class_names) else "video" for label in labels]
    for i, video in enumerate(videos):
        save_video(out / f"{i:03d}_{re.sub(r'[^A-Za-z0-9]+', '-', names[i])}.mp4", video, cfg.fps)
    columns = max(1, round(len(videos) ** 0.5))
    save_video(out / "samples.gif", tile(videos, columns, names[:len(videos)]), cfg.fps)
    cells = [f"frame {t}" if t else name for name in names[:len(videos)][:16] for t in range(videos.shape[1])]
    save_video(out / "samples.png", film_strips(videos[:16], cells))
    print(f"wrote {cfg.n} videos to {out}/samples.npz, the first {len(videos)} also as mp4, in samples.gif and .png")
    if cfg.interp or cfg.time_interp or cfg.extrapolate:                            # the two ends of the way
        pair = [file_tokens(path, vae, device)[0] if path else draw_tokens(cfg, dit, condition(i, 1), i, how)[0]
                for i, path in ((0, cfg.video_a), (cfg.n - 1, cfg.video_b))]
        return torch.stack(pair)                                                    # (2, N, d)


def overview(cfg, vae, dit, device, out):
    """One picture: clips, their reconstructions, and generated videos, of the same classes where clips have them."""
    clips, _ = unseen_clips(cfg, vae)
    made = load_videos(out / "samples.npz", 8)                                      # (8, T, 3, H, W), or fewer
    drawn = np.load(out / "samples.npz")["labels"][:len(made)].tolist()
    first = [np.flatnonzero(clips.labels == label) for label in drawn]
    shown = [int(at[0]) if len(at) else i % len(clips) for i, at in enumerate(first)]
    real = torch.stack([clips[clip, i][0] for i, clip in enumerate(shown)])         # (8, T, 3, H, W)
    recon = vae.play(vae.encode(real.to(device))[0])                                # (8, T, 3, H, W)
    labels = [*(clips.classes[clips.labels[clip]] for clip in shown), *["reconstruction"] * len(made),
              *("generated" if len(at) else "generated: another" for at in first)]
    save_video(out / "overview.gif", tile(torch.cat([real, recon, made]), len(made), labels), cfg.fps)
    print(f"wrote {out}/overview.gif: clips over their reconstructions over generated videos")


def interpolate(cfg, vae, device, out, tokens):
    """lambda * a + (1 - lambda) * b on the tokens; kernels go straight, then are normalised (paper Sec. 4.5.2).

    Writes interp.gif and interp.png; returns the latter's sheet, (1, 3, H', W').
    """
    a, b = tokens
    lam = torch.linspace(1, 0, 9, device=device)[:, None, None]                     # (9, 1, 1)
    videos = vae.play(lam * a + (1 - lam) * b)                                      # (9, T, 3, H, W)
    labels = [f"lambda {value:.3g}" for value in lam.flatten().tolist()]
    save_video(out / "interp.gif", tile(videos, 9, labels), cfg.fps)
    cells = [f"frame {t}" if t else label for t in range(videos.shape[1]) for label in labels]
    sheet = film_strips(videos.transpose(0, 1), cells)                              # (T, 9, ...): time down
    save_video(out / "interp.png", sheet)
    print(f"wrote {out}/interp.gif and interp.png: lambda 1 ... 0 from left to right, time down")
    return sheet


def render_times(cfg, vae, device, out, tokens):
    """The same weights asked for frames between and beyond the trained ones (paper Sec. 4.5.1, B).

    Writes gifs and pngs; returns time_interp.png's sheet, (1, 3, H', W'), if it was asked for.
    """
    T, net, sheet = vae.cfg.frames, vae.decoder.instantiate(tokens[0]), None
    if cfg.time_interp:
        frame = torch.arange(T * cfg.time_interp, device=device) / cfg.time_interp                  # 0, 1/8, .. T - 1/8
        video = net(frame).cpu()                                                    # (8T, 3, H, W)
        save_video(out / "time_interp.gif", video, cfg.fps * cfg.time_interp)
        rows = torch.arange(min(4, T - 1))[:, None] * cfg.time_interp + torch.arange(cfg.time_interp + 1)
        labels = [f"t = {t:.3g}" for t in frame.cpu()[rows.flatten()].tolist()]
        sheet = tile(video[rows.flatten(), None], cfg.time_interp + 1, labels)
        save_video(out / "time_interp.png", sheet)
        print(f"wrote {out}/time_interp.gif, {len(frame)} frames from {T}, and .png: from a trained frame to the next")
    if cfg.extrapolate:
        video = net(torch.arange(2 * T, device=device).float()).cpu()               # (2T, 3, H, W)
        save_video(out / "extrapolate.gif", video, cfg.fps)
        labels = [f"frame {t}" + " (new)" * (t >= T) for t in range(2 * T)]
        save_video(out / "extrapolate.png", film_strips(video[None], labels))
        print(f"wrote {out}/extrapolate.gif and .png: frames 0..{T - 1} are trained, {T}..{2 * T - 1} are not")
    return sheet


def condition_tokens(vae, dit, clips):
    """What a DiT of --condition frames, image or edge is told of clips. Shapes: (k, T, 3, H, W) -> (k, N, d)."""
    shown = condition_video(clips, dit.cfg.condition)                               # (k, T, 3, H, W)
    return (vae.encode(shown)[0] - dit.token_mean) / dit.token_std                  # (k, N, d)


def predict(cfg, vae, dit, device, out, how):
    """Generate from a real video what the DiT was trained to: its future, its motion, or it from its edges."""
    if not dit.by_tokens:
        raise SystemExit(f"{cfg.dit} was trained with --condition {dit.cfg.condition}; --predict needs a DiT trained "
                         "with --condition frames, image or edge")
    clip = file_tokens(cfg.predict, vae, device)[1]                                 # (T, 3, H, W)
    shown = condition_video(clip, dit.cfg.condition)                                # (T, 3, H, W)
    batches = condition_tokens(vae, dit, clip[None].to(device)).expand(cfg.n, -1, -1).split(cfg.batch)
    videos = torch.cat([vae.play(draw_tokens(cfg, dit, part, i * cfg.batch, how)) for i, part in enumerate(batches)])
    rows = torch.cat([torch.stack([clip, shown]), videos])                          # (2 + n, T, 3, H, W)
    names = ["the video", f"shown: {dit.cfg.condition}", *(f"answer {i}" for i in range(cfg.n))]
    save_video(out / "predict.gif", tile(rows, 6, names), cfg.fps)
    cells = [f"frame {t}" if t else name for name in names[:8] for t in range(len(clip))]
    save_video(out / "predict.png", film_strips(rows[:8], cells))
    print(f"wrote {out}/predict.gif and .png: the video, what was shown ({dit.cfg.condition}), {cfg.n} answers")


def compress(cfg, vae, device, out):
    """The first clip of a video file as a .nerv file; prints what each number of bits would cost and keep."""
    tokens, clip = file_tokens(cfg.compress, vae, device)                           # (N, d), (T, 3, H, W)
    if not tokens.isfinite().all():
        raise SystemExit(f"the tokenizer makes tokens of {cfg.compress} that are not finite; train it again")
    c, path, used = vae.cfg, out / (Path(cfg.compress).stem + ".nerv"), vae.decoder.used    # used (N, d): all, mostly
    about = dict(vae_sha256=vae.sha256, frames=c.frames, resolution=c.resolution)
    blobs = {bits: pack_tokens(tokens[used], bits, **about) for bits in (4, 5, 6, 7, 8, 32)}
    stored = torch.zeros(len(blobs), *used.shape, device=device)                    # (6, N, d)
    stored[:, used] = torch.stack([unpack_tokens(blob)[1] for blob in blobs.values()]).to(device)
    videos = vae.play(stored)                                                       # (6, T, 3, H, W)
    each = psnr_from_mse((videos - clip).square().mean((2, 3, 4)))                  # (6, T)
    psnr = dict(zip(blobs, each.mean(1).tolist()))
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        file.write(blobs[cfg.bits])
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    names = ["the video", *(f"{bits} bits, {len(blob)} bytes" for bits, blob in blobs.items())]
    cells = [f"frame {t}" if t else name for name in names for t in range(c.frames)]
    save_video(out / "compress.png", film_strips(torch.cat([clip[None], videos]), cells))
    print(" bits    bytes   bits/pixel   PSNR dB   lost dB")
    for bits, blob in blobs.items():
        print(f"{bits:5d} {len(blob):8d} {8 * len(blob) / (c.frames * c.resolution ** 2):12.4f} {psnr[bits]:9.2f} "
              f"{psnr[32] - psnr[bits]:9.3f}")
    print(f"wrote {path} at {cfg.bits} bits: {c.frames} frames of {c.resolution} x {c.resolution}; and compress.png")


def decompress(cfg, vae, vae_path, device, out):
    """Play a .nerv file through the tokenizer that made it, into an mp4 and a gif."""
    header, values = read_nerv(cfg.decompress)                                      # values (n,)
    made_by, c = str(header.get("vae_sha256")), vae.cfg
    if made_by != vae.sha256:
        raise SystemExit(f"{cfg.decompress} was made by another tokenizer than {vae_path} (its sha256 starts "
                         f"{made_by[:12]!r}, not {vae.sha256[:12]!r}); give that one with --vae")
    used = vae.decoder.used                                                         # (N, d)
    if len(values) != used.sum():
        raise SystemExit(f"{cfg.decompress} has {len(values)} numbers, {vae_path} takes {int(used.sum())}")
    tokens = torch.zeros(used.shape, device=device).masked_scatter(used, values.to(device))         # (N, d)
    video = vae.decode(tokens[None], torch.arange(c.frames, device=device).float())[0].cpu()        # (T, 3, H, W)
    path = out / Path(cfg.decompress).name              # clip.nerv.mp4: clip.mp4 may be the original in the same folder
    for suffix in (".mp4", ".gif"):
        save_video(path.with_name(path.name + suffix), video, cfg.fps)
    print(f"wrote {path}.mp4 and .gif: {c.frames} frames of {c.resolution} x {c.resolution}")


def export(name, vae, dit):
    """The averaged weights of both stages in half precision, without optimizer state: small enough to hand on."""
    half = lambda model: {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    paths = [Path(f"{name}-{stage}.pt") for stage in ("vae", "dit")]
    written = save_checkpoint(paths[0], dict(config=asdict(vae.cfg), classes=vae.classes, step=vae.step,
                                             made_by=nerv_vae.MADE_BY, ema=half(vae)))
    written = written and save_checkpoint(paths[1], dict(
        config=asdict(replace(dit.cfg, vae=str(paths[0]))), classes=dit.class_names, step=dit.step, ema=half(dit),
        made_by=nerv_dit.MADE_BY, vae_sha256=file_hash(paths[0]), tokens=list(dit.token_mean.shape)))
    if not written:
        raise SystemExit(f"--export {name} failed")
    print(f"wrote {paths[0]} and {paths[1]}, {sum(p.stat().st_size for p in paths) / 1e6:.1f} MB; "
          f"use them with --weights {name}")


# ---------------------------------------------------------------------------------------------- how fast; skip it

def encoder_flops(c):
    """Of NeRVEncoder for one clip, two for each multiply-add, counted from its layers."""
    patches, dim = c.frames // c.patch_frames * (c.resolution // c.patch) ** 2, c.enc_dim
    L = patches + c.tokens                              # 24 L dim^2: qkv, proj and mlp have 3 + 1 + 4 + 4 dim^2 weights
    blocks = c.enc_depth * (24 * L * dim ** 2 + 4 * L ** 2 * dim)
    return blocks + 6 * patches * c.patch_frames * c.patch ** 2 * dim + 4 * c.tokens * dim * c.token_dim


def dit_flops(c, N, d):
    """Of one pass of DiT over one token set with a class condition."""
    blocks = c.depth * (24 * N * c.dim ** 2 + 4 * N ** 2 * c.dim + 12 * c.dim ** 2)
    return blocks + 4 * N * d * c.dim + 2 * (256 * c.dim + c.dim ** 2) + 4 * c.dim ** 2


def peak_memory(device, reset=False):
    """Peak bytes since the last reset: of CUDA's allocator, of this process on Linux, 0 where neither can be asked."""
    if device.type == "cuda":
        return torch.cuda.reset_peak_memory_stats() if reset else torch.cuda.max_memory_allocated()
    try:
        if reset:
            if nerv_vae.LIBC:
                nerv_vae.LIBC.malloc_trim(0)            # pick_device told it to keep what is freed
            return Path("/proc/self/clear_refs").write_text("5")                    # VmHWM falls to what is in use now
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    except OSError:
        return 0


def measure(call, device, budget):
    """Call it until `budget` seconds or 100 times are over, twice at least. Returns the first time and the others."""
    sync, times = torch.cuda.synchronize if device.type == "cuda" else lambda: None, []
    peak_memory(device, reset=True)
    while len(times) < 2 or sum(times) < budget and len(times) < 101:
        sync()
        start = time.perf_counter()
        call()
        sync()
        times.append(time.perf_counter() - start)
    return times[0], times[1:]


def bench(cfg, device, out, c, dc):
    """Time every part at the sizes of c (stage 1) and dc (stage 2) with random weights, against this machine's ceiling.

    The ceiling is the larger of two times: operations at the rate of one large matrix product (the better of two
    libraries' forms), and bytes at the rate of one large copy, all timed here. The bytes are those that no program can
    avoid: weights, input and output once (9 times the weights in a training step: two passes, gradients, AdamW). Memory
    is what comes on top of an idle process.
    Source: paper Tables A2, A3, E.16. Departs: the median of at most 100 calls in 15 s, E.1 averages 100; no LPIPS and
            no GAN; bfloat16 autocast and torch.compile on CUDA only
    """
    gpu, B, up, rows = device.type == "cuda", cfg.batch, c.resolution // c.pe_size, []
    compiled, dtype = torch.compile if gpu else lambda f: f, torch.bfloat16 if gpu else torch.float32
    amp, n = torch.autocast(device.type, torch.bfloat16, enabled=gpu), 8192 if gpu else 2048
    peak_memory(device, reset=True)
    idle, size = peak_memory(device), lambda module: sum(p.numel() for p in module.parameters())
    x, y = torch.randn(2, n, n, device=device, dtype=dtype)
    product = 2 * n ** 3 / min(measure(lambda: x @ y, device, 3)[1])                # FLOP/s
    x = x.view(1, n, n // 32, 32).contiguous(memory_format=torch.channels_last)     # the same product as a 1 x 1
    y = y.view(n, n, 1, 1).contiguous(memory_format=torch.channels_last)            # convolution: another library's
    conv = 2 * n ** 3 / min(measure(lambda: torch.conv2d(x, y), device, 3)[1])
    matmul = max(product, conv)
    x, y = torch.zeros(2, 2 ** 28 if gpu else 2 ** 26, device=device)
    copy = 8 * x.numel() / min(measure(lambda: x.copy_(y), device, 3)[1])           # bytes/s, read and written
    del x, y
    machine = dict(device=torch.cuda.get_device_name() if gpu else "CPU", threads=torch.get_num_threads(), batch=B,
                   model=c.model, resolution=c.resolution, dtype=str(dtype), torch=torch.__version__,
                   matmul_tflop_per_s=product / 1e12, conv1x1_tflop_per_s=conv / 1e12, copy_gb_per_s=copy / 1e9)
    print(*(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in machine.items()))
    print(f"{'':<42}  params M tokens     TFLOP   latency s  compile s  peak GB  share  calls")

    def row(name, call, flop, weights, moved=0, scale=1):
        """The thing takes `scale` times as long as the call, and moves `moved` bytes besides its weights."""
        first, times = measure(call, device, 15)
        latency, floor = scale * float(np.median(times)), max(flop / matmul, (4 * weights + moved) / copy)
        rows.append(dict(name=name, params=weights, tokens=c.tokens, tflop=flop / 1e12, latency_s=latency,
                         compile_s=first - times[0] if gpu else 0.0, peak_gb=(peak_memory(device) - idle) / 1e9,
                         floor_s=floor, share=floor / latency, calls=len(times), scale=scale))
        r = rows[-1]
        print(f"{name:<42} {weights / 1e6:9.3f} {c.tokens:6d} {r['tflop']:9.3f} {latency:11.4f} {r['compile_s']:10.1f} "
              f"{r['peak_gb']:8.2f} {r['share']:6.1%} {len(times):6d}", flush=True)

    def training(name, model, loss, flop):
        opt = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step():
            opt.zero_grad(set_to_none=True)
            with amp:
                value = loss()
            value.backward()
            opt.step()
        row(name, step, flop, size(model), moved=32 * size(model))

    frame, z = torch.arange(c.frames, device=device).float(), torch.randn(B, c.tokens, c.token_dim, device=device)
    video = torch.rand(B, c.frames, 3, c.resolution, c.resolution, device=device) * 2 - 1
    vae = nerv_vae.NeRVVAE(c).to(device)
    encode, decode, pixels = compiled(vae.encoder), compiled(vae.decoder), 4 * video[0].numel()
    one, clip = size(vae.decoder), c.frames * sum(map(flops, vae.decoder.layers))   # weights; operations for a clip
    vae.eval()
    with torch.no_grad(), amp:
        net = vae.decoder.instantiate(z[0])
        fast, own = compiled(net), sum(b.numel() for b in net.buffers())            # own: without the affine heads
        row("decode", lambda: decode(z, frame), B * clip, one, B * pixels)
        # One frame at a time on a CPU, whose caches then hold the feature maps; all at once on a GPU.
        row("decode one clip, instantiated", lambda: [fast(f) for f in frame.split(c.frames if gpu else 1)], clip, own,
            pixels)
        if 720 % up == 0:                               # convolutions do not mind the grid: at 128, 45 x 80 cells of 16
            x = positional_embedding(frame[:1], 1280 // up, c.pe_dim, c.pe_base)[:, :, :720 // up]  # (1, 48, 45, 80)
            x = x.contiguous(memory_format=torch.channels_last)
            row("one frame of 1280 x 720, instantiated", lambda: render(net.layers, net.convs, x, c.side),
                clip / c.frames * 1280 * 720 / c.resolution ** 2, own, 12 * 1280 * 720)
        row("encode", lambda: encode(video), B * encoder_flops(c), size(vae.encoder), B * pixels)
    z16 = torch.randn(16, c.tokens, c.token_dim, device=device)
    for form, assemble in (("factored", False), ("a kernel each", True)):           # a training step, no optimizer
        twin = GenerativeNeRV(c).to(device)
        for conv in twin.convs:
            conv.assemble = assemble
        row(f"decoder fp32 16 x 1 frames, {form}", lambda: twin(z16, frame[:1]).square().mean().backward(),
            48 * clip / c.frames, one, 8 * one)
    del twin
    vae.train()

    def vae_loss():
        mean, logvar = encode(video)
        recon = decode(mean + (logvar / 2).exp() * torch.randn_like(mean), frame)
        return (recon.float() - video).square().mean() + c.kl_weight * nerv_vae.kl_divergence(mean, logvar).sum() / B
    training("training step, stage 1", vae, vae_loss, 3 * B * (clip + encoder_flops(c)))
    del vae, encode, decode, net, fast
    dit, cond = nerv_dit.DiT(dc, c.tokens, c.token_dim, 101).to(device), torch.zeros(B, device=device, dtype=torch.long)
    fast, t, schedule = compiled(dit), torch.full((B,), 500, device=device), nerv_dit.noise_schedule(device)
    each = dit_flops(dc, c.tokens, c.token_dim)
    noise = torch.randn(2, *z.shape, device=device)
    training("training step, stage 2", dit, lambda: nerv_dit.diffusion_loss(fast, z, noise, t, cond, schedule, 5.0),
             3 * B * each)
    if gpu:
        dit.compile(mode="reduce-overhead")             # as sampling does
    for sampler, steps in (("ddpm", 250), ("ddim", 50)):
        timed = steps if gpu else 2
        with amp:
            row(f"{steps} {sampler} steps, guidance 2" + (f" (2 timed, x {steps // 2})" if timed < steps else ""),
                lambda: sample_tokens(dit, cond, z, sampler, timed, 2.0), steps * 2 * B * each, size(dit),
                4 * size(dit) * (steps - 1), steps // timed)
    (out / "bench.json").write_text(json.dumps(dict(machine=machine, rows=rows), indent=1) + "\n")
    print(f"wrote {out}/bench.json")


def main(argv=None):
    """Command line of sample.py. Returns the folder written to."""
    cfg, device = parse_config(Config, {}, argv), pick_device()
    if cfg.device == "cuda" and device.type != "cuda":
        raise SystemExit("--device cuda: PyTorch sees no GPU here; use --device cpu")
    device = torch.device("cpu") if cfg.device == "cpu" else device
    if cfg.batch < 0 or cfg.n < 1:
        raise SystemExit(f"--batch {cfg.batch} --n {cfg.n}: give numbers of videos, 1 or more")
    cfg = replace(cfg, batch=cfg.batch or (1 if cfg.bench else 16))
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    if cfg.bench:
        row = "ucf256" if cfg.resolution == 256 else "ucf"
        stage1 = {**nerv_vae.PRESETS[row], "model": cfg.model, "checkpointing": False}
        bench(cfg, device, out, nerv_vae.Config(**stage1),
              nerv_dit.Config(**nerv_dit.PRESETS[row]))
        return out
    with torch.no_grad():
        if cfg.reconstruct or cfg.compress or cfg.decompress:
            path = f"{cfg.weights}-vae.pt" if cfg.weights else cfg.vae or "out/vae/ckpt.pt"
            vae = load_vae(path, device)
            vae.path, vae.sha256 = Path(path), file_hash(path)
            if cfg.reconstruct:
                reconstruct(cfg, vae, device, out)
            if cfg.compress:
                compress(cfg, vae, device, out)
            if cfg.decompress:
                decompress(cfg, vae, path, device, out)
            return out
        if cfg.weights:
            cfg = replace(cfg, dit=f"{cfg.weights}-dit.pt", vae=f"{cfg.weights}-vae.pt")
        if not Path(cfg.dit).is_file():
            raise SystemExit(f"no checkpoint at {cfg.dit}; make it with: python nerv_vae.py && python nerv_dit.py; or "
                             "see what came of the built-in data, with --weights assets/toy")
        dit = load_dit(cfg.dit, device)
        path = cfg.vae or dit.cfg.vae
        vae = load_vae(path, device)
        vae.path, vae.sha256 = Path(path), file_hash(path)
        if vae.sha256 != dit.vae_sha256:
            raise SystemExit(f"{cfg.dit} was trained on the tokens of another tokenizer than {path} (its sha256 starts "
                             f"{dit.vae_sha256[:12]}, not {vae.sha256[:12]}); give that one with --vae, or train "
                             "again: python nerv_dit.py --no-resume")
        if cfg.export:
            export(cfg.export, vae, dit)
            return out
        if cfg.compile and device.type == "cuda":
            dit.compile(mode="reduce-overhead")
        guidance = cfg.guidance or (1.0 if dit.cfg.condition != "class" else dit.cfg.guidance)
        how = dict(sampler=dit.cfg.sampler if cfg.sampler == "auto" else cfg.sampler,
                   sample_steps=cfg.sample_steps or dit.cfg.sample_steps, guidance=guidance)
        if dit.by_tokens and guidance != 1:
            raise SystemExit(f"{cfg.dit} was trained with --condition {dit.cfg.condition}, guidance exaggerates a "
                             "class: give --guidance 1, or leave it out")
        if cfg.predict:
            predict(cfg, vae, dit, device, out, how)
            return out
        tokens = generate(cfg, vae, dit, device, out, how)
        if cfg.overview:
            overview(cfg, vae, dit, device, out)
        sheets = [interpolate(cfg, vae, device, out, tokens)] if cfg.interp else []
        if cfg.time_interp or cfg.extrapolate:
            sheets.append(render_times(cfg, vae, device, out, tokens))
        if cfg.interp and cfg.time_interp:              # weights above, time below
            widest = max(sheet.shape[-1] for sheet in sheets)
            sheets = [F.pad(sheet, (0, widest - sheet.shape[-1]), value=1) for sheet in sheets]
            save_video(out / "interpolation.png", torch.cat(sheets, 2))
            print(f"wrote {out}/interpolation.png: both on one sheet")
    return out


if __name__ == "__main__":
    main()
