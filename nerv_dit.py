"""Stage 2: a diffusion transformer that generates weight tokens, and so videos.

    clip -> frozen NeRV-VAE encoder -> mean, logvar (B, N, d)               once, into a token cache
    z = alpha_t * tokens + sigma_t * noise -> DiT(z, t, class or condition tokens) -> noise, Min-SNR weighted
    noise -> DDPM or DDIM with guidance -> tokens -> NeRV decoder -> video

    python nerv_dit.py                                      # on the tokens of out/vae/ckpt.pt, whatever its data set
    python nerv_dit.py --vae out/k600/ckpt.pt --condition frames        # frame prediction, 5 given frames
    torchrun --nproc_per_node=8 nerv_dit.py --vae out/vae/ckpt.pt       # --batch is what all do together

It writes out/dit/: ckpt.pt, log.jsonl, step_XXXXXX.gif (samples) and index.html, the page of the run; and beside the
tokenizer tokens-KEY.npy, the token cache, which every DiT on that tokenizer shares.

Letters: B videos, N weight tokens, d channels a token, M cached clips, m vectors that steer the blocks; z is noisy
         tokens, eps the noise in them.
Ranges:  tokens are normalised to mean 0, std 1, as measured on the cache. `t` is diffusion time, an integer: 0 is almost data, 999 is
         almost noise. `guidance` 1 means off.
"""
import argparse
import dataclasses
import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import (build_dataset, condition_video, file_hash, parse_config, progress, save_video,
                  tile, write_file)
from nerv_vae import (MADE_BY as VAE_MADE_BY, Attention, Block, Run, carry_on, ignore_stops,
                      learning_rate, load_checkpoint, load_vae, mlp, sinusoids, size_of, told,
                      update_ema)


@dataclass(frozen=True)
class Config:
    """Settings of stage 2; the defaults are the toy preset. Paper: Sec. 3.3, A.1; the rest is choice."""

    # data
    vae: str = "out/vae/ckpt.pt"    # the tokenizer: checkpoint of nerv_vae.py
    dataset: str = "toy"            # toy|ucf|ucf256|k600|folder|laptop|workstation|nerv_enc: presets; default: --vae's
    data_root: str = ""             # folder of videos, if they have moved since stage 1
    clips_per_video: int = 1        # 1..: random clips of each video in the token cache, some mirrored (choice)
    condition: str = "class"        # class|none|frames|image|edge: what a video is made from (paper Sec. 4.3, E.7)
    # transformer
    backbone: str = "dit"           # dit|gpt|latte: adaLN-Zero; prepended tokens, not causal; two axes (Table 3a)
    depth: int = 6                  # 0..: transformer blocks (paper: 24)
    heads: int = 4                  # 1..: attention heads (paper: 16)
    dim: int = 128                  # 1..: width (paper: 1024)
    class_dropout: float = 0.1      # 0..1: how often the class is hidden in training, for guidance (choice: as DiT)
    # loss
    min_snr_gamma: float = 5.0      # 0..: Min-SNR weight; 0 is off (paper Table 3b; gamma is choice: Hang et al.'s 5)
    scheduled_sampling: float = 0.5     # 0..1: chance of a second pass on the own step (Table 3b; 0.5: choice)
    ss_ramp: float = 0.3            # 0..1: that chance rises linearly over this share of training (choice: as LARP)
    ss_stride: int = 1              # 1..999: the own step goes from t to t - stride (paper: 1)
    # optimisation
    batch: int = 32                 # 1..: B, token sets per step (choice for the paper presets: 256, as DiT)
    steps: int = 1850               # 1..: optimizer steps (paper A.1: 1M)
    lr: float = 4e-3                # 0..: peak learning rate (paper A.1: 1e-4)
    warmup: int = 100               # 0..: steps of linear warmup before the cosine (paper A.1; length: choice)
    grad_accum: int = 1             # 1..: passes that share an optimizer step: less memory
    ema: float = 0.999              # 0..1: decay of the averaged weights (choice)
    # sampling
    sampler: str = "ddim"           # ddpm|ddim: ancestral or deterministic steps (choice: paper presets ddpm, as DiT)
    sample_steps: int = 50          # 2..1000: steps from noise to tokens (paper Table A3: 250)
    guidance: float = 3.0           # 0..: classifier-free guidance, 1 is off (paper A.1: 2)
    # run
    bf16: bool = False              # bfloat16 autocast on CUDA
    compile: bool = False           # torch.compile on CUDA
    workers: int = 0                # 0..: loader processes of each rank for the token cache
    log_every: int = 50             # 1..: steps between lines of log.jsonl
    eval_every: int = 925           # 1..: steps between sample pictures and checkpoints
    out: str = "out/dit"            # folder of the run
    seed: int = 0                   # 0..4294967295: fixes initial weights, clips and noise
    resume: bool = True             # continue from out/ckpt.pt; --no-resume starts over, the old one is ckpt.old.pt


PAPER = dict(
    clips_per_video=8, depth=24, heads=16, dim=1024, batch=256, steps=1_000_000, lr=1e-4,
    warmup=10_000, ema=0.9999, sampler="ddpm", sample_steps=250, guidance=2.0, bf16=True, compile=True,
    workers=8, log_every=100, eval_every=10_000)
LAPTOP = dict(clips_per_video=4, dim=192, steps=8500, eval_every=1700)
WORKSTATION = dict(
    clips_per_video=8, heads=8, dim=512, batch=256, steps=7400, lr=2.5e-3, warmup=300, bf16=True,
    compile=True, workers=8, eval_every=3700)
K600 = {**PAPER, "condition": "frames", "guidance": 1.0, "clips_per_video": 1}
PRESETS = {"toy": {}, "laptop": LAPTOP, "workstation": WORKSTATION, "ucf": PAPER, "ucf256": PAPER,
           "folder": PAPER, "nerv_enc": PAPER, "k600": K600}
MADE_BY = "python nerv_dit.py"      # stands in the checkpoint


# ---------------------------------------------------------------------------------------------- model

class DiTBlock(nn.Module):
    """Transformer block steered by adaLN-Zero: shift, scale and gate of both halves come from time and class.

    All gates start at zero, so a new block is the identity.
    Shapes:  x (B, L, dim), steering (B, 6, dim) -> (B, L, dim)
    Source:  DiT (Peebles & Xie 2023)
    """

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(dim, heads)
        self.mlp = mlp(dim)
        self.adaln = nn.Linear(dim, 6 * dim)
        zeroed(self.adaln)                              # gates of zero

    def attend(self, x):
        return self.attention(x)

    def forward(self, x, steering):
        shift1, scale1, gate1, shift2, scale2, gate2 = steering.chunk(6, 1)  # (B, 1, dim) each
        x = x + gate1 * self.attend(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """Predicts the noise in noisy weight tokens. The tokens are a set without space or time: no patches, no 2-D grid.

    Shapes:  z (B, N, d), t (B,) int, cond -> eps (B, N, d)
             cond is class labels (B,) int, where the number of classes stands for "no class"; or tokens (B, N, d)
    Units:   z and eps have unit variance, cond tokens are as the tokenizer gives them; t 0 is almost data
    Source:  paper Sec. 3.3, 4.3 (frames: condition tokens double the input channels), A.1 (24 layers, 16 heads, 1024).
             Choice: a learned vector says which token is which, as each feeds its own slice of a kernel. Departs:
             image and edge conditions double the channels too, where E.7 speaks of cross attention: one way for all
    """

    def __init__(self, cfg, tokens, token_dim, classes):
        super().__init__()
        self.cfg = cfg
        self.classes = classes
        self.by_tokens = cfg.condition in ("frames", "image", "edge")
        dim = cfg.dim
        self.embed = nn.Linear(token_dim * (2 if self.by_tokens else 1), dim)
        self.which = nn.Parameter(0.5 * torch.randn(tokens, dim))  # about as large as the embedding
        self.time = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(classes + 1, dim)     # the last row: no class
        nn.init.normal_(self.label.weight, std=0.02)
        self.blocks = nn.ModuleList(make_block(cfg, tokens, i) for i in range(cfg.depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        if cfg.backbone != "gpt":
            self.final_adaln = nn.Linear(dim, 2 * dim)
            zeroed(self.final_adaln)
        self.out = nn.Linear(dim, token_dim)
        zeroed(self.out)                                # the first guess is: no noise
        # Of the cache: tokens are normalised with them, and those that leave the sampler scaled back.
        self.register_buffer("token_mean", torch.zeros(tokens, token_dim))
        self.register_buffer("token_std", torch.ones(tokens, token_dim))

    def forward(self, z, t, cond):
        return self.denoise(z, self.steer(t, self.labels(cond)), cond)

    def labels(self, cond):
        """The class that a condition names: none where it is tokens, or there is but one class.

        Shapes: as cond -> (B,)
        """
        if self.by_tokens or self.classes == 1:
            return torch.full((len(cond),), self.classes, device=cond.device)
        return cond

    def steer(self, t, labels):
        """What time and class tell the blocks, six vectors each, two for the output. Shapes: (B,) x 2 -> (B, m, dim).

        It does not look at the tokens, so a sampler can make it for several steps at once.
        """
        time = self.time(sinusoids(t, 256))                             # (B, dim)
        label = self.label(labels)                                      # (B, dim)
        if self.cfg.backbone == "gpt":
            return torch.stack([time, label], 1)                        # (B, 2, dim)
        c = F.silu(time + label)
        parts = [layer(c) for layer in [*(block.adaln for block in self.blocks), self.final_adaln]]
        return torch.cat(parts, 1).unflatten(1, (-1, self.cfg.dim))     # (B, 6*depth+2, dim)

    def denoise(self, z, steering, cond):
        """The transformer itself. Shapes: z (B, N, d), steering (B, m, dim), cond as above -> (B, N, d)."""
        if self.by_tokens:
            z = torch.cat([z, self.normalise(cond)], -1)                # (B, N, 2d)
        x = self.embed(z) + self.which                                  # (B, N, dim)
        if self.cfg.backbone == "gpt":
            return self.denoise_prepended(x, steering)
        *steerings, final = steering.split([6] * len(self.blocks) + [2], 1)
        for block, steering in zip(self.blocks, steerings):
            x = block(x, steering)
        shift, scale = final.chunk(2, 1)                                # (B, 1, dim) each
        return self.out(self.norm(x) * (1 + scale) + shift).float()     # (B, N, d)

    def denoise_prepended(self, x, steering):
        """Table 3a's G.pt: time and class are two more tokens. Shapes: (B, N, dim), (B, 2, dim) -> (B, N, d)."""
        x = torch.cat([steering, x], 1)                                 # (B, 2+N, dim)
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x[:, 2:])).float()                    # (B, N, d)

    def normalise(self, tokens):
        """Tokens of the tokenizer to mean 0, std 1. Shapes: (B, N, d) -> (B, N, d)."""
        return (tokens - self.token_mean) / self.token_std


def zeroed(layer):
    """Set a linear layer to zero, for a start that changes nothing."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


# ---------------------------------------------------------------------------------------------- loss and sampler

def noise_schedule(device="cpu"):
    """alpha_t and sigma_t of z_t = alpha_t * tokens + sigma_t * noise, t = 0 (almost data) .. 999 (almost noise).

    Shapes: -> alpha (1000,), sigma (1000,); alpha^2 + sigma^2 = 1
    Source: paper Sec. 3.3 (the form). Choice: DDPM's linear betas 1e-4 .. 2e-2, as DiT
    """
    kept = (1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)).cumprod(0)  # alpha_t^2
    alpha = kept.sqrt().float()
    sigma = (1 - kept).sqrt().float()
    return alpha.to(device), sigma.to(device)


def min_snr_weight(snr, gamma):
    """Loss weight of a noise prediction: min(SNR, gamma) / SNR, and 1 for gamma 0. Shapes: any -> the same, in (0, 1].

    Units:  SNR = alpha^2 / sigma^2, large near the data
    Source: paper Sec. 3.3 prints min(SNR, gamma), which weighs a prediction of the data; A.1 says it is adjusted for
            predicting the noise. Choice: adjusted as Hang et al. do, divided by SNR; taken literally on noise it
            would favour the clean end
    """
    if gamma == 0:
        return torch.ones_like(snr)
    return snr.clamp(max=gamma) / snr


def ancestral_step(z, eps, now, then, noise):
    """One DDPM step: a draw from q(z_then | z_now, tokens guessed from eps). Shapes: z, eps, noise (B, N, d).

    `now` and `then` are pairs (alpha, sigma), `then` the less noisy one; (1, 0) is the data. Each is a
    scalar, or (B, 1, 1) where every video has its own time.
    Source: DDPM (Ho et al. 2020), Eqs. 6 and 7, for any two times. Choice: the smaller of its two variances, fixed
            (DiT learns it)
    """
    alpha, sigma = now
    alpha_then, sigma_then = then
    guess = (z - sigma * eps) / alpha                  # tokens, as z = alpha * tokens + sigma * eps
    ratio = alpha / alpha_then
    fresh = 1 - ratio ** 2                             # variance that comes in between then and now
    mean = (alpha_then * fresh * guess + ratio * sigma_then ** 2 * z) / sigma ** 2
    return mean + sigma_then / sigma * fresh.clamp(min=0).sqrt() * noise


def diffusion_loss(model, tokens, noise, t, cond, schedule, gamma, own_step=0):
    """Min-SNR weighted error of the predicted noise; and, with scheduled sampling, that of a second pass.

    own_step 0: no second pass. Else it starts where the model itself arrives from t at t - own_step, and it is asked
    for the noise that separates that point from the true tokens, so that the truth stays the target.
    Shapes:  tokens (B, N, d) normalised, noise (2, B, N, d) for the two passes, t (B,) int in [own_step, 999], cond
             as DiT -> scalar
    Source:  paper Sec. 3.3, Eq. 2. Choice: the second target; a DDPM step without gradient leads there; decided once
             for a whole batch
    """
    def at(t):
        alpha, sigma = schedule
        return alpha[t][:, None, None], sigma[t][:, None, None]         # (B, 1, 1) each

    def error(eps, target, time):
        alpha, sigma = at(time)
        weight = min_snr_weight((alpha / sigma).square(), gamma)        # (B, 1, 1)
        return (weight * (eps - target).square()).mean()

    alpha, sigma = at(t)
    z = alpha * tokens + sigma * noise[0]                               # (B, N, d)
    eps = model(z, t, cond)
    loss = error(eps, noise[0], t)
    if own_step:
        then = t - own_step
        with torch.no_grad():
            z = ancestral_step(z, eps, at(t), at(then), noise[1])
            alpha, sigma = at(then)
            target = (z - alpha * tokens) / sigma
        loss = loss + error(model(z, then, cond), target, then)
    return loss


@torch.no_grad()
def denoise_steps(model, cond, noise, sampler="ddim", steps=50, guidance=1.0, seed=0, quiet=True):
    """Walk from noise to weight tokens; yields (z, guess) after every step: where it is, and where it aims.

    Guidance acts on all d channels: eps = eps_none + guidance * (eps_class - eps_none), both halves in one batch.
    Fresh noise of video i follows from seed + i, so that a video does not depend on the batch it is in.
    Shapes:  noise (B, N, d), cond as DiT -> (B, N, d) twice, scaled back to the tokenizer's units
    Source:  paper Table A3 (250 steps), A.1 (guidance 2). Choice: DDPM's ancestral steps, as DiT; DDIM has eta 0
    """
    if guidance != 1 and model.by_tokens:
        raise ValueError("guidance needs a class condition; use --guidance 1")
    alpha, sigma = noise_schedule()                     # on the CPU: numbers, to a GPU
    times = torch.linspace(999, 0, steps).round().long()                # (steps,): 999 .. 0, evenly
    # The last step ends at the data, where alpha is 1 and sigma 0.
    alpha = torch.cat([alpha[times], alpha.new_ones(1)])                # (steps+1,)
    sigma = torch.cat([sigma[times], sigma.new_zeros(1)])
    if sampler == "ddpm":
        fresh = noise_of_steps(noise, steps, seed)                      # (steps, B, N, d)
    z = noise                                           # stays float32 throughout
    copies = 1
    if guidance != 1:
        copies = 2
        none = torch.full_like(cond, model.classes)
        cond = torch.cat([cond, none])                                  # (2B,)
    steering = steer_ahead(model, times.to(z.device), model.labels(cond))  # in turn, for each step
    for i in progress(range(steps), quiet, desc="sampling", unit="step", leave=False):
        with autocast(z):
            eps = model.denoise(z.repeat(copies, 1, 1), next(steering), cond).float()  # (2B, N, d)
        if copies == 2:
            eps, eps_none = eps.chunk(2)                                # (B, N, d) each
            eps = eps_none + guidance * (eps - eps_none)
        guess = (z - sigma[i] * eps) / alpha[i]         # the tokens that eps implies
        if sampler == "ddpm":
            now = (alpha[i], sigma[i])
            then = (alpha[i + 1], sigma[i + 1])
            z = ancestral_step(z, eps, now, then, fresh[i])
        else:
            z = alpha[i + 1] * guess + sigma[i + 1] * eps
        yield z * model.token_std + model.token_mean, guess * model.token_std + model.token_mean


def sample_tokens(model, cond, noise, sampler="ddim", steps=50, guidance=1.0, seed=0, quiet=True):
    """Noise to weight tokens: where denoise_steps arrives. Shapes: noise (B, N, d) -> tokens (B, N, d)."""
    for tokens, _ in denoise_steps(model, cond, noise, sampler, steps, guidance, seed, quiet):
        pass
    return tokens


def generate(model, vae, cond, noise, **how):
    """Noise to videos, the whole generator. Shapes: noise (B, N, d) -> (B, T, 3, H, W) in [-1, 1]."""
    tokens = sample_tokens(model, cond, noise, **how)
    return vae.play(tokens)                          # each video's tokens are its network's kernels


# ---------------------------------------------------------------------------------------------- training

def measure_tokens(model, cache):
    """Set the mean and std that tokens are normalised with, from at most 4096 cached clips: those of a draw."""
    if len(cache) < 2:
        raise SystemExit("one clip cannot be told from noise: stage 2 needs two clips at least, better "
                         "thousands")
    rows = np.random.default_rng(0).permutation(len(cache))[:4096]
    some = torch.from_numpy(cache[rows]).float()                        # (m, 2 or 3, N, d)
    model.token_mean.copy_(some[:, 0].mean(0))
    variance = some[:, 0].var(0) + some[:, 1].exp().mean(0)             # (N, d)
    model.token_std.copy_(variance.sqrt())


def train(cfg):
    """Train stage 2; write the token cache, ckpt.pt, log.jsonl, pictures and a page. Returns the checkpoint's path."""
    with Run(cfg, MADE_BY, "stage 2") as run:
        vae = load_vae(cfg.vae, run.device)
        cache, meta = cache_tokens(cfg, vae, run)                       # (M, 2 or 3, N, d)
        classes = meta["classes"]
        labels = torch.tensor(meta["labels"])                           # (M,)
        if cfg.condition != "class":
            labels = torch.full_like(labels, len(classes))

        torch.manual_seed(cfg.seed)
        N, d = cache.shape[2:]
        model = DiT(cfg, N, d, len(classes)).to(run.device)
        ema = DiT(cfg, N, d, len(classes)).to(run.device)
        ema.eval().requires_grad_(False)
        measure_tokens(model, cache)
        ema.load_state_dict(model.state_dict())
        opt = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        run.keep([opt], model=model, ema=ema)
        run.resume(classes=classes, vae_sha256=vae.sha256, tokens=[N, d], clips=len(cache))
        forward = run.wrap(model)
        schedule = noise_schedule(run.device)
        run.start(f"{len(cache)} cached clips, {cfg.backbone} {size_of(model)} parameters, {N} tokens")

        while run.step < cfg.steps:
            step = run.step
            run.seed_step()
            # 1. Cached token sets, random times, and whether this step has a second pass (scheduled sampling).
            rows = torch.randint(len(cache), (cfg.batch,))              # (B,)
            rows = rows.sort()[0]                                       # read in the disk's order
            ramp = min(1.0, step / max(cfg.ss_ramp * cfg.steps, 1))
            own_step = cfg.ss_stride if torch.rand(()) < cfg.scheduled_sampling * ramp else 0
            t = torch.randint(own_step, 1000, (cfg.batch,))             # (B,)
            hidden = torch.rand(cfg.batch) < cfg.class_dropout          # (B,)
            noise = torch.randn(3, cfg.batch, N, d, device=run.device)
            posterior_noise = noise[2]                  # the others are for the two passes
            model.zero_grad(set_to_none=True)
            for part in run.passes:
                # 2. The draw from each posterior is new every time; so is whether the class is hidden, for guidance.
                entry = torch.from_numpy(cache[rows[part].numpy()])     # (b, 2 or 3, N, d)
                entry = send(entry, run.device).float()
                mean, logvar, *condition = entry.unbind(1)              # (b, N, d) each
                tokens = mean + (logvar / 2).exp() * posterior_noise[part]
                tokens = model.normalise(tokens)                        # (b, N, d)
                if model.by_tokens:
                    cond = condition[0]                                 # (b, N, d)
                else:
                    label = labels[rows[part]].masked_fill(hidden[part], len(classes))
                    cond = send(label, run.device)                      # (b,)
                time = send(t[part], run.device)                        # (b,)
                # 3. Noise them to a random time, predict the noise; now and then also from the model's own next step.
                with run.autocast():
                    loss = diffusion_loss(forward, tokens, noise[:2, part], time, cond, schedule,
                                          cfg.min_snr_gamma, own_step)
                (loss / cfg.grad_accum).backward()
                run.add(dict(loss=loss / (2 if own_step else 1)))  # of a pass, on average
            # 4. One optimizer step, then the averaged weights follow.
            run.add(run.update(model, [opt], learning_rate(step, cfg)))
            update_ema(ema, model, cfg.ema, step)
            # 5. Log; now and then save and draw a picture; stop if a signal asks for it.
            run.batch_names = [f"cache row {row}" for row in rows.tolist()]
            run.finish_step()
            if run.time_to_save:
                run.save()
            if run.time_to_log:
                row = run.means()
                if run.time_to_look and run.rank == 0:
                    draw_samples(ema, vae, cache, labels, classes, run)
                run.log(row, shown=("loss",))
            run.leave_if_asked()
    return run.path


def main(argv=None):
    """Command line of stage 2; without --dataset, the tokenizer's is the preset row. Returns the checkpoint's path."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--vae", default=Config.vae)
    vae = Path(first.parse_known_args(argv)[0].vae)
    dataset = None
    if vae.exists():
        dataset = load_checkpoint(vae, "cpu", VAE_MADE_BY)["config"]["dataset"]
    return train(parse_config(Config, PRESETS, argv, dataset))


# ==================================================================================================================
# The method ends here. Below: Table 3a's other backbones, what samplers prepare, and the token cache.

def make_block(cfg, tokens, i):
    """Block i of a backbone."""
    if cfg.backbone == "gpt":
        return Block(cfg.dim, cfg.heads)
    if cfg.backbone == "latte":
        return LatteBlock(cfg.dim, cfg.heads, tokens, i % 2)
    return DiTBlock(cfg.dim, cfg.heads)


class LatteBlock(DiTBlock):
    """Attends along one axis of a grid of tokens only: rows in one block, columns in the next.

    Source: Latte (paper Table 3a). Choice: the most square grid, 8 x 16 at 128 tokens
    """

    def __init__(self, dim, heads, tokens, axis):
        super().__init__(dim, heads)
        rows = max(r for r in range(1, math.isqrt(tokens) + 1) if tokens % r == 0)
        self.grid = (rows, tokens // rows)
        self.axis = axis

    def attend(self, x):
        grid = x.unflatten(1, self.grid)                                # (B, rows, columns, dim)
        if self.axis:
            grid = grid.transpose(1, 2)
        y = self.attention(grid.flatten(0, 1)).view(grid.shape)  # along one axis only
        if self.axis:
            y = y.transpose(1, 2)
        return y.flatten(1, 2)                                          # (B, L, dim)


def send(x, device):
    """To the device, from pinned memory, so that nothing waits for the GPU."""
    if device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def autocast(x):
    """bfloat16 on a GPU, whatever --bf16 says of training; the state of the sampler stays float32."""
    return torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda)


def steer_ahead(model, times, labels, at_once=10):
    """Yields what steers the blocks at each time, made for ten steps at a time: their weights are read once for all.

    Shapes: times (steps,), labels (B,) -> (B, m, dim) for each step
    """
    for some in times.split(at_once):
        with torch.no_grad(), autocast(times):
            made = model.steer(some.repeat_interleave(len(labels)), labels.repeat(len(some)))
        yield from made.unflatten(0, (len(some), -1))                   # (B, m, dim) each


def noise_of_steps(noise, steps, seed):
    """Fresh noise for every step, drawn before the walk, which then never waits for the CPU.

    2^31 keeps the seeds apart from those of the starting noise. Shapes: noise (B, N, d) -> (steps, B, N, d)
    """
    fresh = []
    for i in range(len(noise)):
        generator = torch.Generator().manual_seed(2 ** 31 + seed + i)
        fresh.append(torch.randn(steps, *noise.shape[1:], generator=generator))
    return torch.stack(fresh, 1).to(noise.device)


def draw_samples(model, vae, cache, labels, classes, run):
    """A picture of 16 samples, of conditions from all over the cache."""
    cfg = run.cfg
    rows = torch.from_numpy(np.random.default_rng(0).integers(len(cache), size=16))
    cond = labels[rows]                                                 # (16,)
    if model.by_tokens:
        cond = torch.from_numpy(cache[rows.numpy(), 2]).float()         # (16, N, d)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(16, *cache.shape[2:], generator=generator)
    guidance = 1.0
    if cfg.condition == "class":
        guidance = cfg.guidance
    videos = generate(model, vae, cond.to(run.device), noise.to(run.device), sampler=cfg.sampler,
                      steps=cfg.sample_steps, guidance=guidance)
    names = [*classes, "generated"]                     # the last: of no class
    names = [names[label] for label in labels[rows].tolist()]
    with carry_on(run.picture):
        save_video(run.picture, tile(videos, 4, names))


def load_dit(path, device):
    """The trained denoiser: averaged weights, frozen.

    It has .cfg, .class_names, .step, .path, .sha256 and .vae_sha256, the tokenizer's.
    """
    ckpt = load_checkpoint(path, device, MADE_BY)
    with told(f"{path} does not fit this revision; use the one that made it"):
        model = DiT(Config(**ckpt["config"]), *ckpt["tokens"], len(ckpt["classes"]))
        model.load_state_dict(ckpt["ema"])
    model.to(device).eval().requires_grad_(False)
    model.class_names = ckpt["classes"]
    model.step = ckpt["step"]
    model.vae_sha256 = ckpt["vae_sha256"]
    model.path = Path(path)
    model.sha256 = file_hash(path)
    return model


# ------------------------------------------------------------------------------------------ token cache

def cache_tokens(cfg, vae, run):
    """Encode the training clips once; stage 2 never runs the encoder again. Returns cache, notes.

    File: tokens-KEY.npy beside the tokenizer, float16 (M, 2 or 3, N, d): mean, log-variance and,
    with a condition video, the mean of its tokens; and a .json with `labels`, `videos` (which video
    a row comes from) and `classes`. KEY hashes the tokenizer's checkpoint and everything that decides
    the clips, so a stale cache is never read; a damaged one is made again.
    Raises: SystemExit for a disk that is full or cannot be written
    """
    if vae.path.resolve() == run.path.resolve():
        raise SystemExit(f"--out {run.out} is where the tokenizer lies; choose another folder")
    clips = training_clips(cfg, vae, run)
    keys = []
    for r in range(cfg.clips_per_video):
        for i in range(len(clips)):
            keys.append((i, cfg.seed * 1_000_003 + i * 1009 + r))
    kinds = 3 if cfg.condition in ("frames", "image", "edge") else 2
    shape = (len(keys), kinds, vae.cfg.tokens, vae.cfg.token_dim)
    path = vae.path.parent / f"tokens-{cache_key(cfg, vae, clips)}.npy"
    found = read_cache(path, shape)
    if run.agree(int(found is None)):
        fill_cache(cfg, vae, run, clips, keys, path, shape)
        found = read_cache(path, shape)
    return found


def training_clips(cfg, vae, run):
    """The clips that the tokenizer was trained on, wherever their folder lies now."""
    root = cfg.data_root or vae.cfg.data_root
    index = str(vae.path.parent)                        # where stage 1 left its index of the videos
    then = dataclasses.replace(vae.cfg, dataset=cfg.dataset, data_root=root, out=index)
    with run.first_rank_first():
        return build_dataset(then)


def cache_key(cfg, vae, clips):
    """Twelve digits for everything that decides what is in the cache."""
    root = cfg.data_root or vae.cfg.data_root
    what = [vae.sha256, cfg.clips_per_video, cfg.seed, clips.classes, clips.labels.tolist()]
    if cfg.condition in ("frames", "image", "edge"):
        what.append(cfg.condition)
    for file in clips.files or []:
        state = file.stat()
        what.append([os.path.relpath(file, root), state.st_size, state.st_mtime_ns])
    return digits(json.dumps(what))[:12]


def digits(text):
    return hashlib.sha256(text.encode()).hexdigest()


def read_cache(path, shape):
    """The cache of this shape and its notes; None where there is none, or a damaged one."""
    try:
        cache = np.load(path, mmap_mode="r")
        notes = json.loads(path.with_suffix(".json").read_text())
        whole = cache.shape == shape and cache.dtype == np.float16
        if whole and len(notes["labels"]) == len(notes["videos"]) == len(cache):
            return cache, notes
    except Exception:                                   # damaged files raise anything
        pass
    return None


@torch.no_grad()
def fill_cache(cfg, vae, run, clips, keys, path, shape):
    """Every rank encodes its rows into one file, by ordinary writes: a full disk is a line, no crash."""
    whose = digits(str(run.out.resolve()))[:8]
    part = path.with_suffix(f".{whose}.part")       # of this run: what a kill leaves is used again
    first = run.rank * len(keys) // run.world
    mine = keys[first:(run.rank + 1) * len(keys) // run.world]
    pixels = vae.cfg.frames * vae.cfg.resolution ** 2
    at_once = max(1, min(32, 4 * 16 * 128 ** 2 // pixels))  # no more than a training pass holds
    loader = torch.utils.data.DataLoader(clips, at_once, sampler=mine, num_workers=cfg.workers,
                                         worker_init_fn=ignore_stops)
    labels = [0] * first
    try:
        with run.first_rank_first():
            part.touch()
        with open(part, "r+b") as file:
            header = dict(descr="<f2", fortran_order=False, shape=shape)
            np.lib.format.write_array_header_1_0(file, header)
            file.seek(2 * first * math.prod(shape[1:]), os.SEEK_CUR)
            for video, label in progress(loader, run.rank > 0, desc="encoding clips", leave=False):
                video = video.to(run.device)
                rows = list(vae.encode(video))          # mean, logvar: (b, N, d) each
                if shape[1] == 3:
                    rows.append(vae.encode(condition_video(video, cfg.condition))[0])
                rows = torch.stack(rows, 1).half()      # (b, 2 or 3, N, d)
                file.write(rows.cpu().numpy().tobytes())
                labels += label.tolist()                # of the clips read: a broken file has another's
            file.flush()
            os.fsync(file.fileno())
        labels = run.agree(labels + [0] * (len(keys) - len(labels)))
        if run.rank == 0:
            videos = [i for i, _ in keys]
            notes = dict(labels=labels, videos=videos, classes=clips.classes)
            write_file(path.with_suffix(".json"), json.dumps(notes).encode())
            part.replace(path)
        run.agree(0)
    except OSError as error:
        raise SystemExit(f"cannot write {path} ({error.strerror}): make room, or copy the tokenizer "
                         "to a folder that can be written, and name it with --vae") from error
    finally:
        if run.rank == 0:
            part.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
