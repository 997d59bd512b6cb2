"""From checkpoints to videos: generate, interpolate, look between and beyond the frames, reconstruct, predict.

    python sample.py                            # 16 videos: out/samples/*.mp4, samples.gif, samples.png, samples.npz
    python sample.py --interp                   # and the way from one video's weights to another's
    python sample.py --time-interp 8            # and 8 frames for every trained one
    python sample.py --extrapolate              # and as many frames again beyond the last trained one
    python sample.py --n 2048 --out out/eval    # for fvd.py; stopped and started again, it goes on
    python sample.py --reconstruct --n 256      # original.npz and reconstruction.npz of held-out clips, for fvd.py
    python sample.py --predict clip.mp4         # future of a video (nerv_dit.py --condition frames, image or edge)
    python sample.py --interp --video-a a.mp4 --video-b b.mp4       # between two real videos

Letters: n videos, T frames, H = W pixels, N weight tokens, d channels a token. lambda: 1 is video a, 0 is video b.
Ranges:  pixels are in [-1, 1] until they are written; samples.npz holds uint8. mp4 and gif are lossy, for eyes only.
"""
import json
import os
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import build_dataset, condition_video, count_frames, parse_config, read_clip, save_video, tile, to_uint8
from nerv_dit import file_hash, load_dit, sample_tokens
from nerv_vae import load_vae, pick_device


@dataclass(frozen=True)
class Config:
    """Settings of sample.py; sizes, classes and data come from the checkpoints."""

    # what
    n: int = 16                     # videos
    classes: str = ""               # names or numbers, separated by commas, taken in turn; empty: all classes in turn
    interp: bool = False            # interpolate the weights of two videos (paper Sec. 4.5.2, Fig. A2)
    video_a: str = ""               # with --interp: a video file at lambda 1 instead of the first generated video
    video_b: str = ""               # with --interp: a video file at lambda 0 instead of the last generated video
    time_interp: int = 0            # frames for every trained frame (paper Sec. 4.5.1, Fig. A1: 8)
    extrapolate: bool = False       # as many frames again beyond the last trained one (paper Sec. 4.5.1)
    reconstruct: bool = False       # encode and decode n held-out clips instead of generating
    predict: str = ""               # a video file to continue, animate or redraw (Sec. 4.3, E.7)
    # how
    sampler: str = ""               # ddpm or ddim; empty: as the DiT was configured
    sample_steps: int = 0           # 0: as the DiT was configured
    guidance: float = 0.0           # 1 is off; 0: as the DiT was configured
    batch: int = 16                 # videos at once
    seed: int = 0                   # fixes the noise of every video
    # where
    dit: str = "out/dit/ckpt.pt"    # checkpoint of nerv_dit.py
    vae: str = ""                   # checkpoint of nerv_vae.py; empty: the one the DiT was trained on
    out: str = "out/samples"        # folder that everything is written to
    fps: int = 8                    # of gif and mp4


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
        self.shape, mode = list(shape), "r+" if self.done else "w+"
        self.videos = np.lib.format.open_memmap(self.part, mode, np.uint8, None if self.done else tuple(shape))

    def add(self, videos):
        """Append videos (k, T, 3, H, W) in [-1, 1]."""
        self.videos[self.done:self.done + len(videos)] = to_uint8(videos)
        self.videos.flush()
        self.done += len(videos)
        self.note.write_text(json.dumps(dict(settings=self.settings, shape=self.shape, done=self.done)))

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


def clip_shape(vae):
    """(T, H, W, 3) of a clip in an .npz."""
    return vae.cfg.frames, vae.cfg.resolution, vae.cfg.resolution, 3


def clip_settings(vae):
    """What a measurement must know about the clips of a tokenizer."""
    c = vae.cfg
    return dict(dataset=c.dataset, classes=vae.classes, frames=c.frames, stride=c.stride, resolution=c.resolution,
                split=c.split, vae_sha256=vae.sha256, vae_step=vae.step)


def load_videos(path, count):
    """The first videos of an .npz of ours as floats. Shapes: -> (count, T, 3, H, W) in [-1, 1]."""
    with np.load(path) as file:
        return torch.from_numpy(file["videos"][:count]).movedim(-1, 2).float() / 127.5 - 1


def film_strips(videos):
    """One row a video, time from left to right. Shapes: (n, T, 3, H, W) -> (1, 3, H', W')."""
    return tile(videos.flatten(0, 1)[:, None], videos.shape[1])


# ---------------------------------------------------------------------------------------------- what the flags do

def reconstruct(cfg, vae, device, out):
    """Originals and reconstructions of clips that did not train, as a pair of .npz; prints PSNR."""
    clips = build_dataset(vae.cfg, held_out=True)
    which = "held-out"
    if not len(clips):
        clips, which = build_dataset(vae.cfg), "training (nothing was held out: --split all)"
    order = np.random.default_rng(cfg.seed).permutation(len(clips))[:cfg.n]
    frame = torch.arange(vae.cfg.frames, device=device).float()
    kinds, shape = ("original", "reconstruction"), (len(order), *clip_shape(vae))
    settings = dict(clip_settings(vae), pair=f"{vae.sha256[:12]}-{cfg.seed}-{len(order)}", which=which, seed=cfg.seed)
    stores = [VideoStore(out / f"{kind}.npz", shape, dict(kind=kind, **settings)) for kind in kinds]
    labels, psnr, done = [int(clips.labels[i]) for i in order], [], min(store.done for store in stores)
    for store in stores:
        store.done = done
    for first in tqdm(range(done, len(order), cfg.batch), desc="reconstructing", unit="batch"):
        video = torch.stack([clips[int(i), int(i)][0] for i in order[first:first + cfg.batch]])     # (k, T, 3, H, W)
        recon = vae.decode(vae.encode(video.to(device))[0], frame).cpu()
        psnr += (10 * torch.log10(4 / (recon - video).square().mean((2, 3, 4)).clamp(min=1e-12))).mean(1).tolist()
        stores[0].add(video)
        stores[1].add(recon)
    for store in stores:
        store.close(labels)
    a, b = (load_videos(out / f"{kind}.npz", 8) for kind in kinds)                  # (8, T, 3, H, W) each
    save_video(out / "reconstruction.gif", tile(torch.cat([a, b, (a - b).abs() - 1]), len(a)), cfg.fps)
    if psnr:
        print(f"{len(psnr)} {which} clips: PSNR {np.mean(psnr):.2f} dB (mean over frames, then clips)")
    print(f"wrote {out}/original.npz, reconstruction.npz and reconstruction.gif (original, reconstruction, difference)")


def generate(cfg, vae, dit, device, out, how):
    """n videos into samples.npz, and the first ones as mp4, gif and sheet. Returns tokens of the first and the last."""
    none, frame = len(dit.class_names), torch.arange(vae.cfg.frames, device=device).float()
    labels = pick_labels(cfg.classes, dit.class_names, cfg.n) if dit.cfg.condition == "class" else [none] * cfg.n
    settings = dict(clip_settings(vae), kind="samples", n=cfg.n, seed=cfg.seed, batch=cfg.batch, asked=cfg.classes,
                    labels_drawn="in turn", dit_sha256=file_hash(cfg.dit), dit_step=dit.step, **how)
    store = VideoStore(out / "samples.npz", (cfg.n, *clip_shape(vae)), settings)

    def tokens_of(first, count):
        noise = noise_for(first, count, dit.token_mean.shape, cfg.seed).to(device)
        cond = torch.tensor(labels[first:first + count], device=device)
        return sample_tokens(dit, cond, noise, how["sampler"], how["sample_steps"], how["guidance"], cfg.seed + first,
                             progress=cfg.n <= cfg.batch)                           # (count, N, d)

    for first in tqdm(range(store.done, cfg.n, cfg.batch), desc="generating", unit="batch", disable=cfg.n <= cfg.batch):
        store.add(vae.decode(tokens_of(first, min(cfg.batch, cfg.n - first)), frame).cpu())
    store.close(labels)
    videos = load_videos(out / "samples.npz", 64)
    names = [dit.class_names[label] if label < len(dit.class_names) else "video" for label in labels]
    for i, video in enumerate(videos):
        save_video(out / f"{i:03d}_{re.sub(r'[^A-Za-z0-9]+', '-', names[i])}.mp4", video, cfg.fps)
    columns = max(1, round(len(videos) ** 0.5))
    save_video(out / "samples.gif", tile(videos, columns), cfg.fps, scale=max(1, 96 // videos.shape[-1]))
    save_video(out / "samples.png", film_strips(videos[:16]), scale=max(1, 96 // videos.shape[-1]))
    print(f"wrote {cfg.n} videos to {out}/samples.npz; in samples.gif and samples.png:")
    for i in range(0, min(len(videos), 16), columns):
        print("    " + "   ".join(f"{j:2d} {names[j]:<18}" for j in range(i, min(i + columns, len(videos)))).rstrip())
    return torch.cat([tokens_of(0, 1), tokens_of(cfg.n - 1, 1)])                    # (2, N, d)


def interpolate(cfg, vae, device, out, tokens):
    """lambda * a + (1 - lambda) * b on the weight tokens: the kernels move in a straight line (paper Sec. 4.5.2)."""
    a = file_tokens(cfg.video_a, vae, device)[0] if cfg.video_a else tokens[0]
    b = file_tokens(cfg.video_b, vae, device)[0] if cfg.video_b else tokens[-1]
    lam = torch.linspace(1, 0, 9, device=device)[:, None, None]                     # (9, 1, 1)
    videos = vae.decode(lam * a + (1 - lam) * b, torch.arange(vae.cfg.frames, device=device).float()).cpu()
    save_video(out / "interp.gif", tile(videos, 9), cfg.fps, scale=max(1, 96 // videos.shape[-1]))
    save_video(out / "interp.png", film_strips(videos.transpose(0, 1)), scale=max(1, 96 // videos.shape[-1]))
    print(f"wrote {out}/interp.gif and interp.png: lambda 1 ... 0 from left to right, time down")


def render_times(cfg, vae, device, out, tokens):
    """The same weights asked for frames between and beyond the trained ones (paper Sec. 4.5.1, B)."""
    T, net = vae.cfg.frames, vae.decoder.instantiate(tokens[0])
    if cfg.time_interp:
        frame = torch.arange(T * cfg.time_interp, device=device) / cfg.time_interp                  # 0, 1/8, .. T - 1/8
        video = net(frame).cpu()                                                    # (8T, 3, H, W)
        save_video(out / "time_interp.gif", video, cfg.fps * cfg.time_interp)
        save_video(out / "time_interp.png", tile(video[:4 * cfg.time_interp, None], cfg.time_interp),
                   scale=max(1, 96 // video.shape[-1]))
        print(f"wrote {out}/time_interp.gif and .png: {len(frame)} frames from {T}, {cfg.time_interp} a row in the png")
    if cfg.extrapolate:
        video = net(torch.arange(2 * T, device=device).float()).cpu()               # (2T, 3, H, W)
        save_video(out / "extrapolate.gif", video, cfg.fps)
        save_video(out / "extrapolate.png", film_strips(video[None]), scale=max(1, 96 // video.shape[-1]))
        print(f"wrote {out}/extrapolate.gif and .png: frames 0..{T - 1} are trained, {T}..{2 * T - 1} are not")


def predict(cfg, vae, dit, device, out, how):
    """Generate from a real video what the DiT was trained to: its future, its motion, or it from its edges."""
    if not dit.by_tokens:
        raise SystemExit(f"{cfg.dit} was trained with --condition {dit.cfg.condition}; --predict needs a DiT trained "
                         "with --condition frames, image or edge")
    clip = file_tokens(cfg.predict, vae, device)[1]                                 # (T, 3, H, W)
    shown = condition_video(clip, dit.cfg.condition)
    cond = (vae.encode(shown[None].to(device))[0] - dit.token_mean) / dit.token_std # (1, N, d)
    noise = noise_for(0, cfg.n, dit.token_mean.shape, cfg.seed).to(device)
    tokens = sample_tokens(dit, cond.expand(cfg.n, -1, -1), noise, how["sampler"], how["sample_steps"], seed=cfg.seed,
                           progress=True)                                           # (n, N, d)
    videos = vae.decode(tokens, torch.arange(vae.cfg.frames, device=device).float()).cpu()          # (n, T, 3, H, W)
    rows = torch.cat([torch.stack([clip, shown]), videos])
    save_video(out / "predict.gif", tile(rows, 6), cfg.fps, scale=max(1, 96 // videos.shape[-1]))
    save_video(out / "predict.png", film_strips(rows[:8]), scale=max(1, 96 // videos.shape[-1]))
    print(f"wrote {out}/predict.gif and .png: the video, what was shown ({dit.cfg.condition}), {cfg.n} answers")


def main(argv=None):
    """Command line of sample.py. Returns the folder written to."""
    cfg, device = parse_config(Config, {}, argv), pick_device()
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        if cfg.reconstruct:
            path = cfg.vae or "out/vae/ckpt.pt"
            vae = load_vae(path, device)
            vae.sha256 = file_hash(path)
            reconstruct(cfg, vae, device, out)
            return out
        dit = load_dit(cfg.dit, device)
        path = cfg.vae or dit.cfg.vae
        vae = load_vae(path, device)
        vae.sha256 = file_hash(path)
        if vae.sha256 != dit.vae_sha256:
            raise SystemExit(f"{cfg.dit} was trained on the tokens of another tokenizer than {path} (its sha256 starts "
                             f"{dit.vae_sha256[:12]}, not {vae.sha256[:12]}); give that one with --vae, or train "
                             "again: python nerv_dit.py --no-resume")
        guidance = cfg.guidance or (1.0 if dit.cfg.condition != "class" else dit.cfg.guidance)
        how = dict(sampler=cfg.sampler or dit.cfg.sampler, sample_steps=cfg.sample_steps or dit.cfg.sample_steps,
                   guidance=guidance)
        if cfg.predict:
            predict(cfg, vae, dit, device, out, how)
            return out
        if dit.by_tokens:
            raise SystemExit(f"{cfg.dit} was trained with --condition {dit.cfg.condition}; it needs --predict VIDEO")
        tokens = generate(cfg, vae, dit, device, out, how)
        if cfg.interp:
            interpolate(cfg, vae, device, out, tokens)
        render_times(cfg, vae, device, out, tokens)
    return out


if __name__ == "__main__":
    main()
