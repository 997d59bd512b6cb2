"""Stage 2: a diffusion transformer that generates weight tokens, and so videos.

    clip -> frozen NeRV-VAE encoder -> mean, logvar (B, N, d)               once, into a memory-mapped token cache
    z = alpha_t * tokens + sigma_t * noise -> DiT(z, t, class or condition tokens) -> noise, Min-SNR weighted
    noise -> DDPM or DDIM with guidance -> tokens -> NeRV decoder -> video

    python nerv_dit.py                                      # on the tokens of out/vae/ckpt.pt, whatever its data set
    python nerv_dit.py --vae out/k600/ckpt.pt --condition frames        # frame prediction, 5 given frames
    torchrun --nproc_per_node=8 nerv_dit.py --vae out/vae/ckpt.pt       # --batch stays what all do together

It writes out/dit/: tokens-*.npy (the cache), ckpt.pt, log.jsonl, step_XXXXXX.gif (samples).

Letters: B videos, N weight tokens, d channels a token, M cached clips.
Ranges:  tokens are normalised to mean 0, std 1 in here. `t` is diffusion time, an integer: 0 is almost data, 999 is
         almost noise. `guidance` 1 means off.
"""
import argparse
import dataclasses
import hashlib
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data import build_dataset, condition_video, parse_config, save_video, tile
from nerv_vae import (MADE_BY as VAE_MADE_BY, RANK, WORLD, Attention, Block, add_up, agree, all_at_one_step,
                      first_rank_first, guarded_step, learning_rate, leave, listen_for_stop, load_checkpoint, load_vae,
                      mean_over_ranks, mlp, my_share, not_finite, pick_device, resume_or_start, save_checkpoint,
                      sinusoids, update_ema, write_log, writing)


@dataclass(frozen=True)
class Config:
    """Settings of stage 2; the defaults are the toy preset. Paper: Sec. 3.3, A.1; the rest is choice."""

    # data
    vae: str = "out/vae/ckpt.pt"    # the tokenizer: checkpoint of nerv_vae.py
    dataset: str = "toy"            # toy|ucf|ucf256|k600|folder|laptop|workstation|nerv_enc: presets; left out: --vae's
    data_root: str = ""             # folder of videos, if they have moved since the tokenizer was trained
    clips_per_video: int = 1        # random clips of each video in the token cache, mirrored ones among them (choice)
    condition: str = "class"        # class|none|frames|image|edge: what a video is generated from (paper Sec. 4.3, E.7)
    # transformer
    backbone: str = "dit"           # dit|gpt|latte: adaLN-Zero; prepended tokens, not causal; two axes (Table 3a)
    depth: int = 6                  # transformer blocks (paper: 24)
    heads: int = 4                  # attention heads (paper: 16)
    dim: int = 128                  # width (paper: 1024)
    class_dropout: float = 0.1      # how often the class is hidden in training, for guidance (choice: as DiT)
    # loss
    min_snr_gamma: float = 5.0      # Min-SNR weight; 0 is off (paper Table 3b; gamma is choice: Hang et al.'s 5)
    scheduled_sampling: float = 0.5     # chance of a second pass on the own step; 0 is off (Table 3b; 0.5: choice)
    ss_ramp: float = 0.3            # the probability rises linearly over this share of training (choice: as LARP)
    ss_stride: int = 1              # the own step goes from t to t - stride (paper: 1)
    # optimisation
    batch: int = 32                 # B, token sets per step (choice for the paper presets: 256, as DiT)
    steps: int = 2400               # optimizer steps (paper A.1: 1M)
    lr: float = 4e-3                # AdamW's peak learning rate (paper A.1: 1e-4; choice: README's tuning)
    warmup: int = 100               # steps of linear warmup before the cosine decay (paper A.1, length: choice)
    clip: float = 1.0               # largest gradient norm (choice)
    grad_accum: int = 1             # passes that share an optimizer step, to fit a batch into memory
    ema: float = 0.999              # decay of the averaged weights that sampling uses (choice)
    # sampling
    sampler: str = "ddim"           # ddpm|ddim: ancestral or deterministic steps (choice: paper presets ddpm, as DiT)
    sample_steps: int = 50          # steps from noise to tokens (paper Table A3: 250)
    guidance: float = 3.0           # classifier-free guidance, 1 is off (paper A.1: 2)
    # run
    bf16: bool = False              # bfloat16 autocast on CUDA
    compile: bool = False           # torch.compile on CUDA
    workers: int = 0                # loader processes of each rank while the token cache is filled
    log_every: int = 50             # steps between lines of log.jsonl
    eval_every: int = 1200          # steps between sample pictures and checkpoints
    out: str = "out/dit"            # folder of the run
    seed: int = 0                   # fixes initial weights, clips and noise
    resume: bool = True             # continue from out/ckpt.pt; --no-resume starts over, the old one is ckpt.old.pt


PAPER = dict(clips_per_video=8, depth=24, heads=16, dim=1024, batch=256, steps=1_000_000, lr=1e-4, warmup=10_000,
             ema=0.9999, sampler="ddpm", sample_steps=250, guidance=2.0, bf16=True, compile=True, workers=8,
             log_every=100, eval_every=10_000)
LAPTOP = dict(clips_per_video=4, dim=192, steps=8500, eval_every=1700)
WORKSTATION = dict(clips_per_video=8, heads=8, dim=512, batch=256, steps=7400, lr=2.5e-3, warmup=300, bf16=True,
                   compile=True, workers=8, eval_every=3700)
PRESETS = {"toy": {}, "laptop": LAPTOP, "workstation": WORKSTATION, "ucf": PAPER, "ucf256": PAPER, "folder": PAPER,
           "nerv_enc": PAPER, "k600": {**PAPER, "condition": "frames", "guidance": 1.0, "clips_per_video": 1}}
MADE_BY = "python nerv_dit.py"                          # stands in the checkpoint


# ---------------------------------------------------------------------------------------------- token cache

def cache_tokens(cfg, vae, device):
    """Encode the training clips once; stage 2 never runs the encoder again.

    File: out/tokens-<key>.npy, float16 (M, 2 or 3, N, d): mean, log-variance and, with a condition video, the mean of
    its tokens; beside it a .json with `labels`, `videos` (which source video a row comes from) and `classes`. The key
    hashes the tokenizer's checkpoint and everything that decides the clips, so a stale cache is never read.
    """
    root = cfg.data_root or vae.cfg.data_root
    index = str(Path(cfg.vae).parent)                   # where stage 1 left its index of the videos
    with first_rank_first():
        clips = build_dataset(dataclasses.replace(vae.cfg, dataset=cfg.dataset, data_root=root, out=index))
    with_condition = cfg.condition in ("frames", "image", "edge")
    keys = [(i, cfg.seed * 1_000_003 + i * 1009 + r) for r in range(cfg.clips_per_video) for i in range(len(clips))]
    files = [(os.path.relpath(f, root), f.stat().st_size) for f in clips.files or []]       # wherever the folder lies
    what = [file_hash(cfg.vae), files, clips.labels.tolist(), cfg.clips_per_video, cfg.seed]
    what.append(cfg.condition if with_condition else "")
    path = Path(cfg.out) / f"tokens-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]}.npy"
    notes = path.with_suffix(".json")
    shape = (len(keys), 3 if with_condition else 2, vae.cfg.tokens, vae.cfg.token_dim)
    if not agree(int(path.exists() and notes.exists())):
        part, labels = path.with_suffix(".part"), np.full(len(keys), -1)
        if not RANK:
            for stale in path.parent.glob("tokens-*.part"):                         # of a run that was killed
                stale.unlink()
            np.lib.format.open_memmap(part, "w+", np.float16, shape).flush()
        agree(0)
        cache = np.lib.format.open_memmap(part, "r+")
        mine = np.array_split(np.arange(len(keys)), WORLD)[RANK].tolist()           # each rank fills its rows
        loader = torch.utils.data.DataLoader(clips, 32, sampler=[keys[i] for i in mine], num_workers=cfg.workers)
        row = mine[0] if mine else 0
        for video, label in tqdm(loader, desc="encoding clips", unit="batch", leave=False, disable=RANK > 0):
            video = video.to(device)
            with torch.no_grad():
                rows = list(vae.encode(video))                                      # mean, logvar: (B, N, d) each
                if with_condition:
                    rows.append(vae.encode(condition_video(video, cfg.condition))[0])
            cache[row:row + len(video)] = torch.stack(rows, 1).cpu().half().numpy()
            labels[row:row + len(video)], row = label.numpy(), row + len(video)
        cache.flush()
        labels = agree(labels.tolist())                 # -1 where another rank worked: the largest is the label
        if not RANK:
            notes.write_text(json.dumps(dict(labels=labels, videos=[i for i, _ in keys], classes=clips.classes)))
            os.replace(part, path)
        agree(0)
    cache, meta = np.load(path, mmap_mode="r"), json.loads(notes.read_text())
    if cache.shape != shape or cache.dtype != np.float16 or len(meta["labels"]) != len(keys):
        raise SystemExit(f"{path} does not hold the tokens its name says; delete it, it will be made again")
    return cache, meta


def file_hash(path):
    """sha256 of a file, as hex."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


# ---------------------------------------------------------------------------------------------- model

class DiTBlock(nn.Module):
    """Transformer block steered by adaLN-Zero: shift, scale and gate of both halves come from the conditioning vector.

    All gates start at zero, so a new block is the identity.
    Shapes:  x (B, L, dim), c (B, dim) -> (B, L, dim)
    Source:  DiT (Peebles & Xie 2023); `axis` is Latte's alternation (paper Table 3a). Choice: its grid, 8 x 16 at N 128
    """

    def __init__(self, dim, heads, grid=None, axis=0):
        super().__init__()
        self.grid, self.axis = grid, axis
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attention, self.mlp = Attention(dim, heads), mlp(dim)
        self.adaln = nn.Linear(dim, 6 * dim)
        nn.init.zeros_(self.adaln.weight)
        nn.init.zeros_(self.adaln.bias)

    def attend(self, x):
        if self.grid is None:
            return self.attention(x)
        B, L, dim = x.shape
        x = x.view(B, *self.grid, dim)                                              # (B, rows, columns, dim)
        x = x.transpose(1, 2) if self.axis else x
        y = self.attention(x.flatten(0, 1)).view(x.shape)                           # along one axis only
        return (y.transpose(1, 2) if self.axis else y).reshape(B, L, dim)           # (B, L, dim)

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(F.silu(c))[:, None].chunk(6, -1)  # (B, 1, dim) each
        x = x + gate1 * self.attend(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """Predicts the noise in noisy weight tokens. The tokens are a set without space or time: no patches, no 2-D grid.

    Shapes:  z (B, N, d), t (B,) int, cond: labels (B,) int, `classes` meaning none, or tokens (B, N, d) -> (B, N, d)
    Units:   z, cond tokens and the result ~ unit variance; t 0 is almost data, 999 almost noise
    Source:  paper Sec. 3.3, 4.3 (condition tokens double the input channels), A.1 (24 layers, 16 heads, 1024).
             Choice: a learned vector says which token is which, as each feeds its own slice of a kernel
    """

    def __init__(self, cfg, tokens, token_dim, classes):
        super().__init__()
        self.cfg, self.classes, dim = cfg, classes, cfg.dim
        self.by_tokens = cfg.condition in ("frames", "image", "edge")
        self.embed = nn.Linear(token_dim * (2 if self.by_tokens else 1), dim)
        self.which = nn.Parameter(0.5 * torch.randn(tokens, dim))                   # about as large as the embedding
        self.time = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(classes + 1, dim)                                 # the last row: no class
        nn.init.normal_(self.label.weight, std=0.02)
        rows = max(r for r in range(1, math.isqrt(tokens) + 1) if tokens % r == 0)
        grid = (rows, tokens // rows) if cfg.backbone == "latte" else None
        self.blocks = nn.ModuleList(Block(dim, cfg.heads) if cfg.backbone == "gpt" else
                                    DiTBlock(dim, cfg.heads, grid, i % 2) for i in range(cfg.depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.final_adaln, self.out = nn.Linear(dim, 2 * dim), nn.Linear(dim, token_dim)
        for layer in (self.final_adaln, self.out):                                  # the first guess is: no noise
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.register_buffer("token_mean", torch.zeros(tokens, token_dim))          # of the cache; tokens that leave
        self.register_buffer("token_std", torch.ones(tokens, token_dim))            # sample_tokens are scaled back

    def forward(self, z, t, cond):
        B, N, d = z.shape
        labels = cond.new_full((B,), self.classes, dtype=torch.long) if self.by_tokens else cond
        x = self.embed(torch.cat([z, cond], -1) if self.by_tokens else z) + self.which              # (B, N, dim)
        time = self.time(sinusoids(t, 256))                                         # (B, dim)
        label = self.label(labels)                                                  # (B, dim)
        if self.cfg.backbone == "gpt":
            x = torch.cat([time[:, None], label[:, None], x], 1)                    # (B, 2+N, dim)
            for block in self.blocks:
                x = block(x)
            return self.out(self.norm(x[:, 2:])).float()                            # (B, N, d)
        c = time + label
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.final_adaln(F.silu(c))[:, None].chunk(2, -1)            # (B, 1, dim) each
        return self.out(self.norm(x) * (1 + scale) + shift).float()                 # (B, N, d)


# ---------------------------------------------------------------------------------------------- loss and sampler

def noise_schedule(device="cpu"):
    """alpha_t and sigma_t of z_t = alpha_t * tokens + sigma_t * noise, t = 0 (almost data) .. 999 (almost noise).

    Shapes: -> alpha (1000,), sigma (1000,); alpha^2 + sigma^2 = 1
    Source: paper Sec. 3.3 (the form). Choice: DDPM's linear betas 1e-4 .. 2e-2, as DiT
    """
    kept = (1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)).cumprod(0)   # alpha_t^2
    return kept.sqrt().float().to(device), (1 - kept).sqrt().float().to(device)


def min_snr_weight(snr, gamma):
    """Loss weight of a noise prediction: min(SNR, gamma) / SNR, and 1 for gamma 0. Shapes: any -> the same, in (0, 1].

    Units:  SNR = alpha^2 / sigma^2, large near the data
    Source: paper Sec. 3.3 prints min(SNR, gamma), which weighs a prediction of the data; A.1 says it is adjusted for
            predicting the noise, which divides it by SNR. Taken literally on noise it would favour the clean end.
    """
    return snr.clamp(max=gamma) / snr if gamma else torch.ones_like(snr)


def ancestral_step(z, eps, now, then, noise):
    """One DDPM step: a draw from q(z_then | z_now, tokens guessed from eps). Shapes: z, eps, noise (B, N, d).

    `now` and `then` are (alpha, sigma) pairs, then being less noisy; (1, 0) is the data.
    Source: DDPM (Ho et al. 2020), Eqs. 6 and 7, for any two times: `kept` is the product of 1 - beta between them
    """
    (a, s), (a2, s2) = now, then
    data = (z - s * eps) / a                            # what eps implies, as z = a * data + s * eps
    kept = (a / a2) ** 2                                                            # variance kept from then to now
    mean = (a2 * (1 - kept) * data + a / a2 * s2 ** 2 * z) / s ** 2
    return mean + s2 / s * (1 - kept).clamp(min=0).sqrt() * noise


def diffusion_loss(model, tokens, noise, t, cond, schedule, gamma, own_step=0):
    """Min-SNR weighted error of the predicted noise; with own_step > 0 plus that of a second pass on the model's step.

    The second pass is scheduled sampling: walk from t to t - own_step with the model's own guess, then ask for the
    noise that separates *that* point from the true tokens, so that the truth stays the target.
    Shapes:  tokens (B, N, d) normalised, noise (2, B, N, d) for the two passes, t (B,) int in [own_step, 999], cond as
             DiT -> scalar
    Source:  paper Sec. 3.3, Eq. 2. Choice: the second target, as the paper names none
    """
    def at(t):
        return [c[t][:, None, None] for c in schedule]                              # alpha, sigma: (B, 1, 1)

    def error(noise, t, eps):
        alpha, sigma = at(t)
        weight = min_snr_weight((alpha / sigma).square(), gamma)                    # (B, 1, 1)
        return (weight * (eps - noise).square()).mean()

    alpha, sigma = at(t)
    z = alpha * tokens + sigma * noise[0]                                           # (B, N, d)
    eps = model(z, t, cond)
    loss = error(noise[0], t, eps)
    if own_step:
        with torch.no_grad():
            z = ancestral_step(z, eps, at(t), at(t - own_step), noise[1])
            alpha, sigma = at(t - own_step)
            target = (z - alpha * tokens) / sigma
        loss = loss + error(target, t - own_step, model(z, t - own_step, cond))
    return loss


@torch.no_grad()
def sample_tokens(model, cond, noise, sampler="ddim", steps=50, guidance=1.0, seed=0, progress=False):
    """Walk from noise to weight tokens, ready for the decoder.

    Guidance acts on all d channels: eps = eps_none + guidance * (eps_class - eps_none), both halves in one batch.
    Fresh noise of video i follows from seed + i, so that a video does not depend on the batch it is in.
    Shapes:  noise (B, N, d), cond as DiT -> tokens (B, N, d), scaled back to the tokenizer's units
    Source:  paper Table A3 (250 steps), A.1 (guidance 2). Choice: DDPM's ancestral steps, as DiT; DDIM has eta 0
    """
    if guidance != 1 and model.by_tokens:
        raise ValueError("guidance needs a class condition; use --guidance 1")
    schedule = noise_schedule(noise.device)
    times = torch.linspace(999, 0, steps).round().long().tolist()                   # 999 .. 0, evenly
    # Drawn before the loop, which then never waits for the CPU; 2^31 keeps it apart from the starting noise's seeds.
    if sampler == "ddpm":
        random = [torch.Generator().manual_seed(2 ** 31 + seed + i) for i in range(len(noise))]
        fresh = torch.stack([torch.randn(steps, *noise.shape[1:], generator=g) for g in random], 1).to(noise.device)
    z, copies = noise, 1 if guidance == 1 else 2                                    # z stays float32 throughout
    if copies == 2:
        cond = torch.cat([cond, torch.full_like(cond, model.classes)])              # (2B,): asked for, then none
    all_t = torch.tensor(times, device=z.device)[:, None].expand(-1, copies * len(z)).contiguous()  # (steps, 2B)
    for i, now in enumerate(tqdm(times, desc="sampling", unit="step", leave=False, disable=not progress)):
        with torch.autocast(z.device.type, torch.bfloat16, enabled=z.is_cuda):
            eps = model(z.repeat(copies, 1, 1), all_t[i], cond).float()             # (2B, N, d)
        if copies == 2:
            eps, eps_none = eps.chunk(2)                                            # (B, N, d) each
            eps = eps_none + guidance * (eps - eps_none)
        a, s = (c[now] for c in schedule)
        last = i == steps - 1
        a2, s2 = (torch.ones_like(a), torch.zeros_like(s)) if last else (c[times[i + 1]] for c in schedule)
        if sampler == "ddpm":
            z = ancestral_step(z, eps, (a, s), (a2, s2), fresh[i])                  # fresh (steps, B, N, d)
        else:
            z = a2 * (z - s * eps) / a + s2 * eps
    return z * model.token_std + model.token_mean


# ---------------------------------------------------------------------------------------------- training

def train(cfg):
    """Train stage 2; write the token cache, ckpt.pt, log.jsonl and sample pictures. Returns the checkpoint's path."""
    device, path, mine = pick_device(), Path(cfg.out) / "ckpt.pt", my_share(cfg)
    vae, tokenizer = load_vae(cfg.vae, device), file_hash(cfg.vae)
    ckpt = resume_or_start(cfg, device, MADE_BY)
    if ckpt and ckpt["vae_sha256"] != tokenizer:
        raise SystemExit(f"{path} was trained on another tokenizer than {cfg.vae} is now; use another --out, or "
                         "--no-resume")
    cache, meta = cache_tokens(cfg, vae, device)
    labels = torch.tensor(meta["labels"])
    classes = len(meta["classes"])

    torch.manual_seed(cfg.seed)
    model, ema = (DiT(cfg, vae.cfg.tokens, vae.cfg.token_dim, classes).to(device) for _ in range(2))
    some = torch.from_numpy(np.array(cache[np.random.default_rng(0).permutation(len(cache))[:4096]])).float()
    model.token_mean.copy_(some[:, 0].mean(0))
    model.token_std.copy_((some[:, 0].var(0) + some[:, 1].exp().mean(0)).sqrt())    # of a draw
    ema.load_state_dict(model.state_dict())
    ema.eval().requires_grad_(False)
    opt = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    step, best, state = 0, math.inf, dict(model=model, ema=ema, opt=opt)
    if ckpt:
        step, best = ckpt["step"], ckpt["best"]
        for key, thing in state.items():
            thing.load_state_dict(ckpt[key])
        ckpt = None                                     # model and ema have copied their parts
    all_at_one_step(step, path)
    forward = torch.compile(model) if cfg.compile and device.type == "cuda" else model     # we go on saving `model`
    amp = torch.autocast(device.type, torch.bfloat16, enabled=cfg.bf16 and device.type == "cuda")
    schedule = noise_schedule(device)

    def send(x):                                        # from pinned memory, so that nothing waits for the GPU
        return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)

    def condition(rows, entry):
        if model.by_tokens:
            return (entry[:, 2] - model.token_mean) / model.token_std               # (B, N, d)
        return send(torch.full_like(labels[rows], classes) if cfg.condition == "none" else labels[rows])

    def save(path):
        return save_checkpoint(path, dict(step=step, best=best, config=dataclasses.asdict(cfg), classes=meta["classes"],
                                          made_by=MADE_BY, vae_sha256=tokenizer, tokens=list(model.token_mean.shape),
                                          **{key: thing.state_dict() for key, thing in state.items()}))

    if not RANK:
        print(f"stage 2 on {device}{f' and {WORLD - 1} more' * (WORLD > 1)}: {len(cache)} cached clips, {cfg.backbone} "
              f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {len(model.which)} tokens")
    bar = tqdm(total=cfg.steps, initial=step, desc="stage 2", unit="step", smoothing=0.05, disable=RANK > 0)
    since, shown_at, stop, saved = time.perf_counter(), step, listen_for_stop(), True
    bad, terms = torch.zeros(2, device=device), {}                                  # skipped steps: all, in a row
    while step < cfg.steps:
        # 1. A batch of cached token sets; the draw from each posterior is new every time.
        torch.manual_seed(cfg.seed * 1_000_003 + step)                              # all noise of step s from (seed, s)
        rows = torch.randint(len(cache), (cfg.batch,)).sort()[0]                    # sorted: kinder to the disk
        share = cfg.scheduled_sampling * min(1.0, step / max(cfg.ss_ramp * cfg.steps, 1))
        own_step = cfg.ss_stride if torch.rand(()) < share else 0
        t = torch.randint(own_step, 1000, (cfg.batch,))                             # (B,)
        hidden = torch.rand(cfg.batch) < cfg.class_dropout                          # (B,)
        # (3, B, N, d), for all ranks alike: 0 and 1 for the two passes, 2 for the draw from the posterior
        noise = torch.randn(3, cfg.batch, *model.token_mean.shape, device=device)
        for group in opt.param_groups:
            group["lr"] = learning_rate(step, cfg)
        opt.zero_grad(set_to_none=True)
        each = (mine.stop - mine.start) // cfg.grad_accum
        for part in (slice(first, first + each) for first in range(mine.start, mine.stop, each)):
            entry = send(torch.from_numpy(cache[rows[part].numpy()])).float()       # (B, 2 or 3, N, d)
            tokens = entry[:, 0] + (entry[:, 1] / 2).exp() * noise[2, part]
            tokens = (tokens - model.token_mean) / model.token_std                  # (B, N, d)
            # 2. What the model is told: a class, sometimes hidden so that guidance has something to compare with.
            cond = condition(rows[part], entry)
            if cfg.condition == "class":
                cond = cond.masked_fill(send(hidden[part]), classes)
            # 3. Noise it to a random time and predict the noise; now and then also from the model's own next step.
            with amp:
                loss = diffusion_loss(forward, tokens, noise[:2, part], send(t[part]), cond, schedule,
                                      cfg.min_snr_gamma, own_step)
            (loss / cfg.grad_accum).backward()
            add_up(terms, cfg.grad_accum, loss=loss / (2 if own_step else 1))       # a pass, on average
        # 4. One optimizer step, then the averaged weights follow.
        add_up(terms, 1, grad_norm=guarded_step(opt, model, cfg.clip, bad), steps=torch.ones((), device=device))
        update_ema(ema, model, cfg.ema, step)
        step += 1
        bar.update()

        if step % cfg.log_every == 0 or step % cfg.eval_every == 0 or step == cfg.steps:
            sums = mean_over_ranks(terms)               # over the steps since the last line
            row = dict(step=step, **{key: sums[key] / sums["steps"] for key in ("loss", "grad_norm")},
                       skipped=int(bad[0]), lr=opt.param_groups[0]["lr"],
                       clips_per_s=cfg.batch * (step - shown_at) / (time.perf_counter() - since))
            terms = {}
            bar.set_postfix(loss=f"{row['loss']:.4f}")
            if bad[1] >= 10:
                raise SystemExit(not_finite(row, bad[1], [f"cache row {i}" for i in rows.tolist()]))
            write_log(path.with_name("log.jsonl"), row)
            if step % cfg.eval_every == 0 or step == cfg.steps:
                if row["loss"] < best:
                    best = row["loss"]
                    save(path.with_name("best.pt"))
                saved = save(path)
                if not RANK:
                    pick = torch.arange(16) * 1021 % len(cache)                     # a prime stride meets all classes
                    cond = condition(pick, torch.from_numpy(cache[pick.numpy()]).to(device).float())
                    generator = torch.Generator().manual_seed(0)
                    noise = torch.randn(16, *model.token_mean.shape, generator=generator).to(device)
                    guidance = cfg.guidance if cfg.condition == "class" else 1.0
                    z = sample_tokens(ema, cond, noise, cfg.sampler, cfg.sample_steps, guidance)
                    videos = vae.play(z)                                            # (16, T, 3, H, W)
                    names = [*meta["classes"], "generated"]                         # the last: no class, by_tokens
                    shown = [classes] * 16 if model.by_tokens else cond.tolist()
                    with writing(path.with_name(f"step_{step:06d}.gif")) as picture:
                        save_video(picture, tile(videos, 4, [names[i] for i in shown]))
            since, shown_at = time.perf_counter(), step
        heard = agree(stop[0] if stop else 0)
        if heard:
            saved = save(path)
            bar.close()
            leave(step, path, heard, saved)
    bar.close()
    if not saved:
        raise SystemExit(f"the last save of {path} failed: make room and give the same command again")
    return path


def load_dit(path, device):
    """The trained denoiser: averaged weights, frozen, with .cfg, .class_names, .step and .vae_sha256."""
    ckpt = load_checkpoint(path, device, MADE_BY)
    model = DiT(Config(**ckpt["config"]), *ckpt["tokens"], len(ckpt["classes"])).to(device).eval().requires_grad_(False)
    model.load_state_dict(ckpt["ema"])
    model.class_names, model.step, model.vae_sha256 = ckpt["classes"], ckpt["step"], ckpt["vae_sha256"]
    return model


def main(argv=None):
    """Command line of stage 2; without --dataset, the tokenizer's is the preset row. Returns the checkpoint's path."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--vae", default=Config.vae)
    vae = Path(first.parse_known_args(argv)[0].vae)
    dataset = load_checkpoint(vae, "cpu", VAE_MADE_BY)["config"]["dataset"] if vae.exists() else None
    return train(parse_config(Config, PRESETS, argv, dataset))


if __name__ == "__main__":
    main()
