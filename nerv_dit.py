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
import copy
import hashlib
import json
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import (build_dataset, carry_on, condition_video, parse_config, progress, save_video, tile,
                  write_file)
from nerv_vae import (Attention, Block, Run, ignore_stops, learning_rate, load_model, load_vae, mlp,
                      optimizers, sinusoids, size_of, update_ema)


@dataclass(frozen=True)
class Config:
    """Settings of stage 2; the defaults are the toy preset. Paper: Sec. 3.3, A.1; the rest is choice."""

    # data
    vae: str = "out/vae/ckpt.pt"    # the tokenizer: checkpoint of nerv_vae.py
    dataset: str = "toy"            # toy|ucf|ucf256|k600|folder|laptop|workstation|nerv_enc: presets; default: --vae's
    data_root: str = ""             # folder of videos, if they have moved since stage 1
    clips_per_video: int = 1        # 1..: random clips of each video in the cache (choice)
    condition: str = "class"        # class|none|frames|image|edge: what a video is made from (paper Sec. 4.3, E.7)
    # transformer
    backbone: str = "dit"           # dit|gpt|latte: adaLN-Zero; prepended tokens, not causal; two axes (Table 3a)
    depth: int = 6                  # 0..: transformer blocks (paper: 24)
    heads: int = 4                  # 1..: attention heads (paper: 16)
    dim: int = 128                  # 1..: width (paper: 1024)
    class_dropout: float = 0.1      # 0..1: how often the class is hidden (choice: as DiT)
    # loss
    predict: str = "noise"          # noise|velocity: what the transformer answers (paper A.1: noise)
    min_snr_gamma: float = 5.0      # 0..: Min-SNR weight; 0 is off (paper Table 3b; gamma is choice: Hang et al.'s 5)
    scheduled_sampling: float = 0.5     # 0..1: chance of a second pass (Table 3b; 0.5: choice)
    # optimisation
    batch: int = 32                 # 1..: B, token sets per step (choice of 256: as DiT)
    steps: int = 1100               # 1..: optimizer steps (paper A.1: 1M)
    lr: float = 4e-3                # 0..: peak learning rate (paper A.1: 1e-4)
    muon: bool = False              # Muon for all matrices (departs: A.1's AdamW; preset laptop)
    warmup: int = 100               # 0..: linear, before the cosine (A.1; length: choice)
    grad_accum: int = 1             # 1..: passes that share an optimizer step: less memory
    ema: float = 0.999              # 0..1: decay of the averaged weights (choice)
    # sampling
    sampler: str = "ddim"           # ddpm|ddim: ancestral or deterministic (choice; paper presets: ddpm, as DiT)
    sample_steps: int = 50          # 2..1000: steps from noise to tokens (paper Table A3: 250)
    guidance: float = 3.0           # 0..: classifier-free guidance, 1 is off (paper A.1: 2)
    # run
    bf16: bool = False              # bfloat16 autocast on CUDA
    compile: bool = False           # torch.compile on CUDA
    workers: int = 0                # 0..: loader processes of each rank for the token cache
    log_every: int = 50             # 1..: steps between lines of log.jsonl
    eval_every: int = 550           # 1..: steps between sample pictures and checkpoints
    out: str = "out/dit"            # folder of the run
    seed: int = 0                   # 0..4294967295: fixes initial weights, clips and noise
    resume: bool = True             # continue from out/ckpt.pt; --no-resume starts over, the old one is ckpt.old.pt

    @property
    def by_tokens(self):
        """Whether tokens of a condition video say what to make; else a class does, or nothing."""
        return self.condition in ("frames", "image", "edge")


PAPER = dict(
    clips_per_video=8, depth=24, heads=16, dim=1024, batch=256, steps=1_000_000, lr=1e-4,
    warmup=10_000, ema=0.9999, sampler="ddpm", sample_steps=250, guidance=2.0, bf16=True,
    compile=True, workers=8, eval_every=10_000)
PRESETS = {
    "toy": dict(predict="velocity"),
    "laptop": dict(clips_per_video=4, dim=192, steps=1500, lr=2e-3, muon=True),
    "workstation": dict(
        clips_per_video=8, heads=8, dim=512, batch=256, steps=7400, lr=2.5e-3, warmup=300,
        bf16=True, compile=True, workers=8, eval_every=3700),
    "ucf": PAPER,
    "ucf256": PAPER,
    "folder": PAPER,
    "nerv_enc": PAPER,
    "k600": {**PAPER, "condition": "frames", "clips_per_video": 1}}
MADE_BY = "python nerv_dit.py"      # stands in the checkpoint


# ---------------------------------------------------------------------------------------------- model

class DiTBlock(nn.Module):
    """Transformer block steered by adaLN-Zero: shift, scale and gate of both halves come from time and class.

    All gates start at zero, so a new block is the identity.
    Shapes:  x (B, L, dim), steering (B, 6, dim) -> (B, L, dim)
    Source:  DiT (Peebles & Xie 2023)
    """

    def __init__(self, dim, attention):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)  # no weights: serves both
        self.attention = attention
        self.mlp = mlp(dim)
        self.adaln = zeroed(nn.Linear(dim, 6 * dim))    # gates of zero

    def forward(self, x, steering):
        shift1, scale1, gate1, shift2, scale2, gate2 = steering.chunk(6, 1)  # (B, 1, dim) each
        x = x + gate1 * self.attention(self.norm(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm(x) * (1 + scale2) + shift2)


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
        self.classes = classes                          # how many; also the label that stands for "no class"
        self.by_tokens = cfg.by_tokens
        self.by_class = cfg.condition == "class" and classes > 1
        dim = cfg.dim
        self.embed = nn.Linear(token_dim * (2 if self.by_tokens else 1), dim)
        self.which = nn.Parameter(0.5 * torch.randn(tokens, dim))  # about as large as the embedding
        self.time = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(classes + 1, dim)     # the last row: no class
        nn.init.normal_(self.label.weight, std=0.02)
        self.blocks = nn.ModuleList(make_block(cfg, tokens, i) for i in range(cfg.depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        if cfg.backbone != "gpt":
            self.final_adaln = zeroed(nn.Linear(dim, 2 * dim))
        self.out = zeroed(nn.Linear(dim, token_dim))    # the first answer is 0
        self.register_buffer("schedule", noise_schedule(), persistent=False)
        # Of the cache: tokens are normalised with them, and those that leave the sampler scaled back.
        self.register_buffer("token_mean", torch.zeros(tokens, token_dim))
        self.register_buffer("token_std", torch.ones(tokens, token_dim))

    def forward(self, z, t, cond):
        answer = self.denoise(z, self.steer(t, cond), cond)
        return self.noise_in(z, answer, self.schedule[:, t, None, None])

    def steer(self, t, cond):
        """What time and class tell the blocks: six vectors each, and two for the output.

        It does not look at z, so a sampler can ask for several steps at once.
        Shapes: t (B,), or (S, 1) for S steps; cond as above -> (B, m, dim), or (S, 1 or B, m, dim)
        """
        if not self.by_class:
            cond = torch.full_like(t, self.classes)                     # no class
        time = self.time(sinusoids(t, 256))                             # (..., dim)
        label = self.label(cond)                                        # (..., dim)
        if self.cfg.backbone == "gpt":
            return torch.stack(torch.broadcast_tensors(time, label), -2)    # (..., 2, dim)
        c = F.silu(time + label)
        layers = [block.adaln for block in self.blocks] + [self.final_adaln]
        vectors = torch.cat([layer(c) for layer in layers], -1)
        return vectors.unflatten(-1, (-1, self.cfg.dim))                # (..., 6*depth+2, dim)

    def denoise(self, z, steering, cond):
        """The transformer itself. Shapes: z (B, N, d), steering (B or 1, m, dim), cond as above -> (B, N, d)."""
        if self.by_tokens:
            z = torch.cat([z, self.normalise(cond)], -1)                # (B, N, 2d)
        x = self.embed(z) + self.which                                  # (B, N, dim)
        if self.cfg.backbone == "gpt":
            # Table 3a's G.pt: time and class are two more tokens.
            x = torch.cat([steering.expand(len(x), -1, -1), x], 1)      # (B, 2+N, dim)
            for block in self.blocks:
                x = block(x)
            return self.out(self.norm(x[:, 2:])).float()                # (B, N, d)
        *steerings, final = steering.split([6] * len(self.blocks) + [2], 1)
        for block, steering in zip(self.blocks, steerings):
            x = block(x, steering)
        shift, scale = final.chunk(2, 1)                                # (B, 1, dim) each
        return self.out(self.norm(x) * (1 + scale) + shift).float()     # (B, N, d)

    def noise_in(self, z, answer, level):
        """The noise eps in z = alpha * tokens + sigma * eps that the transformer's answer stands for.

        It is the noise itself, or the velocity alpha * eps - sigma * tokens. Shapes: z, answer (B, N, d) -> the same
        Source: velocity: Salimans & Ho 2022. Departs, toy preset only: classes come out cleaner after a short run
        """
        if self.cfg.predict == "noise":
            return answer
        alpha, sigma = level
        return sigma * z + alpha * answer

    def normalise(self, tokens):
        """Tokens of the tokenizer to mean 0, std 1. Shapes: (B, N, d) -> (B, N, d)."""
        return (tokens - self.token_mean) / self.token_std


def zeroed(layer):
    """The same linear layer, all zero: a start that changes nothing."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


# ---------------------------------------------------------------------------------------------- loss and sampler

def noise_schedule():
    """alpha_t and sigma_t of z_t = alpha_t * tokens + sigma_t * noise, t = 0 (almost data) .. 999 (almost noise).

    Shapes: -> (2, 1000): alpha, sigma; alpha^2 + sigma^2 = 1
    Source: paper Sec. 3.3 (the form). Choice: DDPM's linear betas 1e-4 .. 2e-2, as DiT
    """
    kept = (1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)).cumprod(0)  # alpha_t^2
    return torch.stack([kept, 1 - kept]).sqrt().float()


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


def ddim_step(z, eps, now, then):
    """One DDIM step: the tokens that eps implies, with less of the same noise. Shapes: z, eps (B, N, d) -> the same.

    Source: DDIM (Song et al. 2021), Eq. 12, with eta 0
    """
    alpha, sigma = now
    alpha_then, sigma_then = then
    guess = (z - sigma * eps) / alpha
    return alpha_then * guess + sigma_then * eps


def diffusion_loss(model, tokens, noise, t, cond, schedule, gamma, twice=False):
    """Min-SNR weighted error of the predicted noise; and, with scheduled sampling, that of a second pass.

    The second pass starts where the model's own step from t to t - 1 arrives, and is asked for the noise that
    separates that point from the true tokens, so that the truth stays the target.
    Shapes:  tokens (B, N, d) normalised, noise (2, B, N, d) for the two passes, t (B,) int in 0..999, from 1 on for
             two passes, cond as DiT -> scalar
    Source:  paper Sec. 3.3, Eq. 2. Choice: the second target; a DDPM step without gradient leads there; decided once
             for a whole batch
    """
    def error(eps, target, level):
        alpha, sigma = level
        weight = min_snr_weight((alpha / sigma).square(), gamma)        # (B, 1, 1)
        return (weight * (eps - target).square()).mean()

    now = schedule[:, t, None, None]                                    # (2, B, 1, 1)
    alpha, sigma = now
    z = alpha * tokens + sigma * noise[0]                               # (B, N, d)
    eps = model(z, t, cond)
    loss = error(eps, noise[0], now)
    if twice:
        then = schedule[:, t - 1, None, None]
        alpha, sigma = then
        with torch.no_grad():
            z = ancestral_step(z, eps, now, then, noise[1])
            target = (z - alpha * tokens) / sigma
        loss = loss + error(model(z, t - 1, cond), target, then)
    return loss


@torch.no_grad()
def denoise_steps(model, cond, noise, sampler="ddim", steps=50, guidance=1.0, seed=0):
    """Walk from noise to weight tokens; yields where every step arrives.

    Guidance acts on all d channels: none + guidance * (class - none), both answers from one batch.
    Without classes, guidance is ignored.
    Fresh noise of video i follows from seed + i, so that a video does not depend on the batch it is in.
    Shapes:  noise (B, N, d), cond as DiT -> (B, N, d), scaled back to the tokenizer's units
    Source:  paper Table A3 (250 steps), A.1 (guidance 2). Choice: DDPM's ancestral steps, as DiT; DDIM has eta 0
    """
    times = torch.linspace(999, 0, steps).round().long()                # (steps,): 999 .. 0, evenly
    data = torch.tensor([[1.0, 0.0]])                   # alpha 1, sigma 0: there the last step ends
    levels = torch.cat([noise_schedule()[:, times].T, data])            # (steps+1, 2)
    times = times.to(noise.device)
    if sampler == "ddpm":
        # Numbers far from those of the starting noise.
        fresh = noise_of(2 ** 31 + seed, len(noise), (steps, *noise.shape[1:]))
        fresh = fresh.to(noise.device)                                  # (B, steps, N, d)
    guided = guidance != 1 and model.by_class
    if guided:
        cond = torch.cat([cond, torch.full_like(cond, model.classes)])  # (2B,): the class, no class
    z = noise                                           # stays float32 throughout
    for i in progress(range(steps), desc="sampling", leave=False):
        # A GPU computes in bfloat16, whatever --bf16 says of training.
        with torch.autocast(z.device.type, torch.bfloat16, z.is_cuda):
            if i % 10 == 0:             # ten steps at once: weights that steer are read once
                steering = model.steer(times[i:i + 10, None], cond)     # (10, 1 or 2B, m, dim)
            both = torch.cat([z, z]) if guided else z
            answer = model.denoise(both, steering[i % 10], cond)        # (B or 2B, N, d)
        if guided:
            answer, none = answer.chunk(2)                              # (B, N, d) each
            answer = none + guidance * (answer - none)
        now, then = levels[i:i + 2]
        eps = model.noise_in(z, answer, now)
        if sampler == "ddpm":
            z = ancestral_step(z, eps, now, then, fresh[:, i])
        else:
            z = ddim_step(z, eps, now, then)
        yield z * model.token_std + model.token_mean


def sample_tokens(model, cond, noise, *how, **settings):
    """Noise to weight tokens: where denoise_steps arrives. Shapes: noise (B, N, d) -> (B, N, d)."""
    for tokens in denoise_steps(model, cond, noise, *how, **settings):
        pass
    return tokens


# ---------------------------------------------------------------------------------------------- training

def measure_tokens(model, cache):
    """Set the mean and std that tokens are normalised with, from at most 4096 cached clips.

    The std is that of drawn tokens: it includes the posterior's variance.
    """
    if len(cache) < 2:
        raise SystemExit("stage 2 needs two clips at least, better thousands")
    rows = np.random.default_rng(0).permutation(len(cache))[:4096]
    mean, logvar = torch.from_numpy(cache[rows, :2]).float().unbind(1)  # (m, N, d) each
    variance = mean.var(0) + logvar.exp().mean(0)                       # (N, d)
    model.token_mean.copy_(mean.mean(0))
    model.token_std.copy_(variance.sqrt())


def train(cfg):
    """Train stage 2; write the token cache, ckpt.pt, log.jsonl, pictures and a page. Returns the checkpoint's path."""
    with Run(cfg, MADE_BY) as run:
        device = run.device
        vae = load_vae(cfg.vae, device)
        cache, notes = cache_tokens(cfg, vae, run)                      # (M, 2 or 3, N, d)
        classes = notes["classes"]
        labels = torch.tensor(notes["labels"])                          # (M,)

        torch.manual_seed(cfg.seed)
        N, d = cache.shape[2:]
        model = DiT(cfg, N, d, len(classes)).to(device)
        measure_tokens(model, cache)
        ema = copy.deepcopy(model).eval().requires_grad_(False)
        opts = optimizers(model, cfg)
        run.keep(opts, model=model, ema=ema)
        run.resume(classes=classes, vae_sha256=vae.sha256, tokens=[N, d], clips=len(cache))
        forward = run.wrap(model)
        run.start(f"{len(cache)} cached clips, {N} tokens, {cfg.backbone} {size_of(model)} parameters")

        while run.step < cfg.steps:
            step = run.step
            run.seed_step()
            # 1. Cached token sets, random times, and whether this step has a second pass (scheduled sampling).
            rows = torch.randint(len(cache), (cfg.batch,)).sort()[0]    # (B,), in the disk's order
            ramp = min(1.0, step / (0.3 * cfg.steps))   # the chance of it rises, as LARP's
            twice = int(torch.rand(()) < cfg.scheduled_sampling * ramp)
            t = torch.randint(twice, 1000, (cfg.batch,), device=device)         # (B,)
            hidden = torch.rand(cfg.batch, device=device) < cfg.class_dropout   # (B,)
            noise = torch.randn(3, cfg.batch, N, d, device=device)  # two passes, posterior
            for part in run.passes:
                # 2. The draw from each posterior is new every time; so is whether the class is hidden, for guidance.
                entry = torch.from_numpy(cache[rows[part].numpy()])     # (b, 2 or 3, N, d)
                if run.cuda:
                    entry = entry.pin_memory()          # or the step waits for the GPU
                entry = entry.to(device, non_blocking=True).float()
                mean, logvar, *condition = entry.unbind(1)              # (b, N, d) each
                tokens = mean + (logvar / 2).exp() * noise[2, part]
                tokens = model.normalise(tokens)                        # (b, N, d)
                if model.by_tokens:
                    cond = condition[0]                                 # (b, N, d)
                else:
                    label = labels[rows[part]].to(device, non_blocking=True)
                    cond = label.masked_fill(hidden[part], len(classes))    # (b,)
                # 3. Noise them to a random time, predict the noise; now and then also from the model's own next step.
                with run.autocast():
                    loss = diffusion_loss(forward, tokens, noise[:2, part], t[part], cond, model.schedule,
                                          cfg.min_snr_gamma, twice)
                (loss / cfg.grad_accum).backward()
                run.add(dict(loss=loss / (1 + twice)))  # of a pass, on average
            # 4. One optimizer step, then the averaged weights follow.
            run.add(run.update(model, opts, learning_rate(step, cfg)))
            update_ema(ema, model, cfg.ema, step)
            # 5. Log; now and then save and draw a picture; stop if a signal asks for it.
            run.finish_step()
            if run.time_to_save:
                run.save()
            if run.time_to_log:
                row = run.means([f"cache row {row}" for row in rows.tolist()])
                if run.time_to_look and run.rank == 0:
                    draw_samples(ema, vae, cache, labels, classes, run)
                run.log(row)
            run.leave_if_asked()
    return run.path


def main(argv=None):
    """Command line of stage 2; without --dataset, the tokenizer's is the preset row. Returns the checkpoint's path."""
    vae = load_vae(parse_config(Config, PRESETS, argv).vae, "cpu")
    return train(parse_config(Config, PRESETS, argv, vae.cfg.dataset))


# ==================================================================================================================
# The method ends here. Below: Table 3a's other backbones, noise for the sampler, a picture, the token cache.

def make_block(cfg, tokens, i):
    """Block i of a backbone."""
    if cfg.backbone == "gpt":
        return Block(cfg.dim, cfg.heads)
    if cfg.backbone == "latte":
        attention = AxisAttention(cfg.dim, cfg.heads, tokens, 1 + i % 2)
    else:
        attention = Attention(cfg.dim, cfg.heads)
    return DiTBlock(cfg.dim, attention)


class AxisAttention(Attention):
    """Along one axis of a grid of tokens only: rows in one block, columns in the next.

    Source: Latte (paper Table 3a). Choice: the most square grid, 8 x 16 at 128 tokens
    """

    def __init__(self, dim, heads, tokens, axis):
        super().__init__(dim, heads)
        rows = max(r for r in range(1, math.isqrt(tokens) + 1) if tokens % r == 0)
        self.grid = (rows, tokens // rows)
        self.axis = axis                                # 1: in rows, 2: in columns

    def forward(self, x):
        lines = x.unflatten(1, self.grid).transpose(1, self.axis)       # (B, lines, length, dim)
        y = super().forward(lines.flatten(0, 1)).view(lines.shape)
        return y.transpose(1, self.axis).flatten(1, 2)                  # (B, L, dim)


def noise_of(first, n, shape):
    """Noise of n videos from number `first` on; it follows from a video's number alone. Shapes: -> (n, *shape)."""
    noise = []
    for number in range(first, first + n):
        generator = torch.Generator().manual_seed(number)
        noise.append(torch.randn(shape, generator=generator))
    return torch.stack(noise)


def draw_samples(model, vae, cache, labels, classes, run):
    """A picture of 16 samples, of conditions from all over the cache."""
    cfg = run.cfg
    rows = np.random.default_rng(0).integers(len(cache), size=16)
    noise = noise_of(0, 16, cache.shape[2:])                            # (16, N, d)
    cond = labels[rows]                                                 # (16,)
    if cfg.by_tokens:
        cond = torch.from_numpy(cache[rows, 2]).float()                 # (16, N, d)
    tokens = sample_tokens(model, cond.to(run.device), noise.to(run.device), cfg.sampler,
                           cfg.sample_steps, cfg.guidance)
    names = []
    if cfg.condition == "class":
        names = [classes[label] for label in cond]
    with carry_on(run.picture):
        save_video(run.picture, tile(vae.play(tokens), 4, names))


def load_dit(path, device):
    """The trained denoiser, as `load_model` says; it also has .vae_sha256, the tokenizer's."""
    def build(ckpt):
        model = DiT(Config(**ckpt["config"]), *ckpt["tokens"], len(ckpt["classes"]))
        model.vae_sha256 = ckpt["vae_sha256"]
        return model

    return load_model(path, device, MADE_BY, build)


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
    root = cfg.data_root or vae.cfg.data_root
    there = replace(vae.cfg, dataset=cfg.dataset, data_root=root,
                    out=str(vae.path.parent))           # where stage 1 left its index of the videos
    with run.first_rank_first():
        clips = build_dataset(there)
    what = [vae.sha256, cfg.clips_per_video, cfg.seed, clips.classes, clips.labels.tolist()]
    if cfg.by_tokens:
        what.append(cfg.condition)
    if clips.files:
        what.append(clips.found)                        # size and time of change of each file
    key = hashlib.sha256(str(what).encode()).hexdigest()[:12]
    path = vae.path.parent / f"tokens-{key}.npy"
    if run.agree(int(read_cache(path) is None)):
        fill_cache(cfg, vae, run, clips, path)
    return read_cache(path)


def read_cache(path):
    """The cache and its notes; None where there is none, or a damaged one."""
    try:
        notes = json.loads(path.with_suffix(".json").read_text())
        return np.load(path, mmap_mode="r"), notes
    except Exception:                                   # damaged files raise anything
        return None


@torch.no_grad()
def fill_cache(cfg, vae, run, clips, path):
    """Every rank encodes its rows into one file, by ordinary writes: a full disk is a line, no crash."""
    keys = []
    for r in range(cfg.clips_per_video):
        for i in range(len(clips)):
            keys.append((i, cfg.seed * 1_000_003 + i * 1009 + r))
    n = len(keys)
    first = run.rank * n // run.world
    mine = keys[first:(run.rank + 1) * n // run.world]
    shape = (n, 3 if cfg.by_tokens else 2, vae.cfg.tokens, vae.cfg.token_dim)
    # No more clips at once than a training pass holds.
    at_once = max(1, 2 ** 20 // (vae.cfg.frames * vae.cfg.resolution ** 2))
    loader = torch.utils.data.DataLoader(clips, at_once, sampler=mine, num_workers=cfg.workers,
                                         worker_init_fn=ignore_stops)
    # Named by the number of this run's folder: its own, and what a kill leaves is used again.
    part = path.with_suffix(f".{run.out.stat().st_ino}.part")
    labels = [0] * first
    try:
        part.touch()
        with open(part, "r+b") as file:
            header = dict(descr="<f2", fortran_order=False, shape=shape)
            np.lib.format.write_array_header_1_0(file, header)
            file.seek(file.tell() + 2 * first * math.prod(shape[1:]))
            for video, label in progress(loader, run.rank > 0, desc="encoding clips", leave=False):
                video = video.to(run.device)
                rows = list(vae.encode(video))          # mean, logvar: (b, N, d) each
                if cfg.by_tokens:
                    rows.append(vae.encode(condition_video(video, cfg.condition))[0])
                rows = torch.stack(rows, 1).half()      # (b, 2 or 3, N, d)
                file.write(rows.cpu().numpy())
                labels += label.tolist()                # of the clips read: a broken file has another's
        labels = run.agree(labels + [0] * (n - len(labels)))
        if run.rank == 0:
            notes = dict(labels=labels, videos=[i for i, _ in keys], classes=clips.classes)
            write_file(path.with_suffix(".json"), json.dumps(notes).encode())
            part.replace(path)
        run.agree(0)
    except OSError as error:
        raise SystemExit(f"cannot write {path} ({error.strerror}): make room, or copy the "
                         "tokenizer to where you may write, and name it with --vae") from error
    finally:
        part.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
