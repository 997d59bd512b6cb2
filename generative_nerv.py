"""The decoder: weight tokens become the kernels of one small convolutional network per video.

    tokens z (B, N, d) --affine head of each layer--> a block of that layer's kernel; the rest is shared by all videos
    frame index t, 8 x 8 grid --sinusoids--> (T, 48, 8, 8) -> conv -> [up x2, conv, conv] per doubling (the last: one
    conv) -> toRGB -> tanh                              48 = 3 * pe_dim: sinusoids of time, height and width

    python generative_nerv.py --model L --resolution 128        # prints Table A1, layer by layer

Letters: B videos, T frames, N weight tokens, d channels a token, D hidden width, c_in/c_out/k of a convolution.
Ranges:  tokens ~ N(0, 1). `frame` is the frame index on the training grid, a float: 0 is the first trained frame,
         T-1 the last, 0.5 lies between two, T and more lie beyond the end. Pixels are in [-1, 1].
A feature map is laid out time-major, (T * B, c, H, W), so that "one group per video" is a view and not a copy.
`cfg` is nerv_vae.Config; its lines under "weight tokens and decoder" explain every field used here. The default modes
are the paper's method, all others ablations, to be skipped at first. How tokens enter a kernel: "channel" adds to a
block of it, "fmm" (factorized multiplicative modulation) multiplies it with a low-rank factor, "repeat" is NeRV-Enc's:
each number multiplies four entries. reuse "heads": every layer has a head and reads all tokens; "direct": one head for
all layers; "none": each layer has tokens of its own.
"""
import argparse
import math
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

NERV_WIDTHS = {"S": 128, "B": 256, "L": 512}            # D, paper A.2


class Layer(NamedTuple):
    """One row of Table A1: what a layer does, and which block of its kernel the tokens generate."""
    kind: str           # conv | transposed | bilinear (these two double the size) | rgb
    c_in: int
    c_out: int          # channels of the kernel's output, before any pixel shuffle
    k: int              # kernel size
    size: int           # H = W of the output
    gen_out: int        # the block W[:gen_out, :gen_in] is generated
    gen_in: int
    level: int          # which doubling of the size it belongs to (the paper's block); -1: the stem, last + 1: toRGB
    shuffle: int = 1    # s: after the convolution s * s channels become s x s pixels


def layer_plan(cfg):
    """The layers of the decoder, in order.

    Each level doubles the size until the resolution is reached; the last one is 2D wide, and the convolution before
    it widens. With more doublings the widening moves along: at 256 x 256 one more D-wide level appears (64.5M at L).

    Raises: SystemExit for an unknown model, or when pe_size is not the resolution divided by a power of two
    Source: paper Table A1, Sec. 3.2, E.3. Choice: gen_in x gen_out of the widening layer is 64 x 128, as the table's
            [128, 64, 3, 3] does not say which axis comes first; pixelshuffle and bilinear (Table 2d) take 3 x 3
            kernels, as A.2's other convolutions
    """
    if cfg.model == "nerv_dec":
        return nerv_dec_plan(cfg)
    if cfg.model not in NERV_WIDTHS and not cfg.model.isdigit():
        raise SystemExit(f"--model {cfg.model} is not S, B, L, nerv_dec or a number of channels")
    D, g = NERV_WIDTHS.get(cfg.model) or int(cfg.model), cfg.gen_channels
    doublings = int(math.log2(max(cfg.resolution // cfg.pe_size, 1)))
    if doublings < 1 or cfg.pe_size * 2 ** doublings != cfg.resolution:
        raise SystemExit(f"resolution {cfg.resolution} is not pe_size {cfg.pe_size} times 2, 4, 8, ...; "
                         "change --resolution or --pe-size")

    def layer(kind, c_in, c_out, size, level, k=3):
        wider = c_out // c_in if c_out > c_in else 1
        return Layer(kind, c_in, c_out, k, size, min(g, c_in) * wider, min(g, c_in), level)

    width = lambda i: 2 * D if i == doublings - 1 else D                            # only the last level is 2D wide
    # The stem is generated whole (Table A1).
    stem = layer("conv", 3 * cfg.pe_dim, width(0), cfg.pe_size, -1)
    plan, size = [stem._replace(gen_out=stem.c_out, gen_in=stem.c_in)], cfg.pe_size
    for i in range(doublings):
        size, w = 2 * size, width(i)
        plan += {"transposed": [layer("transposed", w, w, size, i, k=4)],
                 "pixelshuffle": [layer("conv", w, 4 * w, size, i)._replace(shuffle=2)],
                 "bilinear": [layer("bilinear", w, w, size, i)]}[cfg.upsample]
        plan += [layer("conv", w, w, size, i)]
        if i < doublings - 1:                                                       # Table A1: the last level has one
            plan += [layer("conv", w, width(i + 1), size, i)]
        if cfg.side == "skip":
            plan += [Layer("rgb", width(min(i + 1, doublings - 1)), 3, 3, size, 3, min(D, plan[-1].c_out), i)]
    if cfg.side != "skip":
        plan += [Layer("rgb", 2 * D, 3, k=3, size=size, gen_out=3, gen_in=D, level=doublings)]
    return plan


def nerv_dec_plan(cfg):
    """NeRV-Dec, the decoder of NeRV-Enc: time alone goes in, four convolutions enlarge four times each.

    Source: NeRV-Enc A.5 (kernels 1, 3, 3, 3, factors 4, 4, 4, 4, positions of 16). Choice: widths 16, 32, 16, which
            the appendix leaves out; with them its tokens (4 x 256, 128 x 144, 64 x 288) are exactly a quarter of
            each kernel, so that repeating every number four times fills it
    """
    if (cfg.pe_size, cfg.resolution, cfg.side) != (1, 256, "none") or cfg.parameterization == "channel":
        raise SystemExit("--model nerv_dec goes from 1 to 256 pixels, whole kernels at a time, without side paths; "
                         "use --pe-size 1 --resolution 256 --side none --parameterization repeat")
    c = [cfg.pe_dim, 16, 32, 16, 3]
    return [Layer("rgb" if i == 3 else "conv", c[i], 16 * c[i + 1], 3 if i else 1, 4 ** (i + 1), 0, 0, i - 1, shuffle=4)
            for i in range(4)]


# ---------------------------------------------------------------------------------------------- positions

def sinusoids(position, dim, base=10000.0):
    """Sines and cosines of a position at `dim / 2` frequencies, from 1 down to nearly 1 / base radians a unit.

    Shapes:  position (n,) -> (n, dim) in [-1, 1]
    Source:  the transformer's embedding; paper A.1 takes "sinusoidal" in place of NeRV's exponential one
    """
    omega = base ** (-torch.arange(dim // 2, device=position.device) / (dim // 2))  # (dim/2,)
    angle = position.float()[:, None] * omega                                       # (n, dim/2)
    return torch.cat([angle.sin(), angle.cos()], 1)                                 # (n, dim)


def positional_embedding(frame, size, dim, base):
    """The decoder's only input: where in time and space a cell lies.

    Shapes:  frame (T,) -> (T, 3 * dim, size, size) in [-1, 1]
    Units:   `frame` counts training frames and is never divided by T, so fractions and extrapolation keep their meaning
    Source:  paper Sec. 3.2, A.2 (dim = 16 for each of time, height, width). Choice: the fastest sinusoid of height and
             width turns by pi from a cell to the next, the finest pattern a grid can hold, that of time by 1 a frame,
             as frames between frames are asked for. At 1 a cell, 8 neighbours look so alike that their 16 numbers are
             nearly of rank 4; on UCF-101 clips that costs 0.7 dB after 600 steps. (The fastest sine is now 0 at every
             cell, its cosine 1, -1, 1 ...)
    """
    cell = math.pi * torch.arange(size, device=frame.device)
    t = sinusoids(frame, dim, base)[:, :, None, None].expand(-1, -1, size, size)    # (T, dim, size, size)
    y = sinusoids(cell, dim, base).T[None, :, :, None].expand_as(t)
    x = sinusoids(cell, dim, base).T[None, :, None, :].expand_as(t)
    return torch.cat([t, y, x], 1)                                                  # (T, 3*dim, size, size)


# ---------------------------------------------------------------------------------------------- one layer

def bilinear(x):
    """Bilinear x2. Shapes: (n, c, h, w) -> (n, c, 2h, 2w)."""
    if x.device.type == "cpu" or x.is_contiguous(memory_format=torch.channels_last):
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    # On a GPU that gives a thread one pixel of all n * c maps: a third of a training step, with many small maps.
    return bilinear_by_matrices(x)


def bilinear_by_matrices(x):
    """The same as a product with a fixed matrix a side. Shapes: (n, c, h, w) -> (n, c, 2h, 2w)."""
    rows, columns = (F.interpolate(torch.eye(n, dtype=x.dtype, device=x.device)[None], scale_factor=2, mode="linear")[0]
                     for n in x.shape[-2:])                                         # (h, 2h), (w, 2w)
    return rows.T @ (x @ columns)


def convolve(x, kernel, kind, groups=1):
    """The linear part of a layer: `kernel` (groups * c_out, c_in, k, k) applied to x (n, groups * c_in, H, W)."""
    k = kernel.shape[-1]
    if kind == "rgb" and x.device.type == "cpu":
        # Few outputs: one matrix product for all taps, which fold shifts and adds up. It equals the conv2d below, hence
        # the flip, and is 7 times as fast on a CPU.
        taps = kernel.flip(2, 3).movedim(1, 3).unflatten(0, (groups, -1)).flatten(1, 3)     # (groups, c_out*k*k, c_in)
        y = taps @ x.unflatten(1, (groups, -1)).flatten(3)                          # (n, groups, c_out*k*k, H*W)
        return F.fold(y.flatten(0, 1), x.shape[2:], k, padding=k // 2).view(len(x), -1, *x.shape[2:])
    if kind == "transposed":                            # k 4, stride 2, padding 1: exactly twice the size
        kernel = kernel.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)    # (groups*c_in, c_out, k, k)
        return F.conv_transpose2d(x, kernel, stride=2, padding=1, groups=groups)
    if kind == "bilinear":
        x = bilinear(x)
    return F.conv2d(x, kernel, padding=k // 2, groups=groups)


class ModulatedConv2d(nn.Module):
    """A convolution whose kernel differs from video to video and is the same for all frames of one video.

    The tokens *are* part of the kernel: an affine head writes them into W[:gen_out, :gen_in]; all other entries are
    shared by the whole data set. Dividing each output channel by the norm of its kernel keeps activations at unit
    scale whatever was generated.

    No kernel is built per video in a batch, only the block that differs. With W the shared kernel, outputs inside the
    block are  scale * (conv_per_video(x[:, :gen_in], block) + conv(x[:, gen_in:], W[:gen_out, gen_in:])) + bias
    and all others  scale * conv(x, W[gen_out:]) + bias: exact, no product in vain, and most of the work is one dense
    convolution over all videos and frames. Two kinds of kernels are built all the same, as that measured faster: those
    of 64 x 64 channels or fewer, and 3 x 3 ones with at most half as many numbers as the feature map that they make.

    `rows` and `columns` say which tokens a layer reads and how much of each: all, but for --reuse none and NeRV-Enc.

    Shapes:  x (T*B, c_in, H, W) time-major, tokens (B, N, d) -> (T*B, c_out, H', W'), H' = 2H when up-sampling
    Units:   tokens ~ N(0, 1); y has unit scale before its GELU if x is what comes: sinusoids, or a GELU of unit scale
    Source:  paper Sec. 3.1 (channel-wise parameterization, demodulation over all axes but the output channel), E.18.
             Choice: the affine's bias is one number per kernel entry (the shared kernel's own block), so that the
             mean video starts as an ordinary convolution (NeRV-Enc B: such a start of its base kernel is worth 1.8 dB)
    """

    def __init__(self, layer, cfg, rows, columns, head=None):
        super().__init__()
        self.layer, self.mode, self.rows, self.columns = layer, cfg.parameterization, rows, columns
        self.rank = 10                                  # of fmm's low-rank factors (choice: as DIGAN)
        self.expand, self.normalize = cfg.expand, cfg.normalize
        kind, c_in, c_out, k, size, go, gi, *_ = layer
        light = c_in * c_out <= 64 * 64 or kind == "conv" and 2 * c_in * k * k <= (size // layer.shuffle) ** 2
        self.assemble = self.mode != "channel" or not cfg.normalize or light
        # Normalisation removes the scale of a kernel; its initial size only sets how fast Adam's equal steps turn it.
        start = torch.randn(c_out, c_in, k, k)
        self.shared = nn.Parameter(cfg.kernel_init * (start if cfg.conv_init else start.sign()))
        self.bias, self.initial_energy = nn.Parameter(torch.zeros(c_out)), cfg.kernel_init ** 2 * c_in * k * k
        # How many numbers the tokens have to supply; a head gives every token ceil(n / N) of them, the rest is cut.
        # With "repeat" they make up a quarter of the kernel, cut along one of its sides.
        self.sides = {"out": c_out, "in": c_in, "taps": k * k}
        self.quarter = [-(-n // 4) if axis == cfg.expand else n for axis, n in self.sides.items()]
        self.numel = {"channel": go * gi * k * k,
                      "fmm": self.rank * (c_out + c_in),
                      "repeat": math.prod(self.quarter)}[self.mode]
        count = rows.stop - rows.start
        self.head = None                                # a layer of NeRV-Dec without tokens: the same for all videos
        if count:
            self.per_token = -(-self.numel // count)
            self.head = head or nn.Linear(columns, self.per_token, bias=False)
            nn.init.normal_(self.head.weight, std=1 / math.sqrt(columns))           # unit tokens give unit numbers
        # Choice for the two that multiply: a gain of 1 +- 0.3, of which a product of two factors takes the root.
        self.scale = {"channel": cfg.kernel_init, "fmm": 0.3 ** 0.5, "repeat": 0.3}[self.mode]
        # Keep every feature map at unit scale at the start. First, normalisation counts all k taps of an axis, but on
        # average a pixel sees fewer: in a transposed convolution 2, and 1 for the first and last of 2n; else k, less
        # 1 + 2 + .. + k // 2 over the n pixels at both edges. The std falls by seen / k.
        inputs = size // 2 if kind == "transposed" else size // layer.shuffle
        seen = 2 - 1 / inputs if kind == "transposed" else k - (k // 2) * (k // 2 + 1) / inputs
        # Second, the mean square is 1/2 after sines and 0.4256 = 1.533^-2 after GELU of a normal; toRGB feeds tanh.
        self.gain = k / seen * {"rgb": 1.0}.get(kind, 1.533 if layer.level >= 0 else 2 ** 0.5)

    def generated(self, tokens):
        """Numbers this layer takes from the tokens. Shapes: (B, N, d) -> (B, numel).

        One linear map serves all tokens: token n supplies numbers n * per_token to (n + 1) * per_token - 1.
        """
        values = self.head(tokens[:, self.rows, :self.columns])               # (B, n, per_token or more)
        values = values[..., :self.per_token]           # more: the one head of --reuse direct fits the largest layer
        return self.scale * values.flatten(1)[:, :self.numel]                       # (B, numel)

    def kernel(self, tokens):
        """Every video's own normalised kernel: the slow, obvious form. Shapes: (B, N, d) -> (B, c_out, c_in, k, k)."""
        _, c_in, c_out, k, _, go, gi, *_ = self.layer
        shared = self.shared[None]                                                  # (1, c_out, c_in, k, k)
        values = self.generated(tokens) if self.head else None                      # (B, numel)
        if self.head is None:
            kernel = shared.expand(len(tokens), -1, -1, -1, -1)
        elif self.mode == "channel":
            delta = values.view(-1, go, gi, k, k)                                   # (B, go, gi, k, k)
            kernel = shared + F.pad(delta, (0, 0, 0, 0, 0, c_in - gi, 0, c_out - go))
        elif self.mode == "fmm":                        # INR-GAN, DIGAN: low-rank factors multiply the shared kernel
            left, right = values.split([self.rank * c_out, self.rank * c_in], 1)
            low_rank = left.view(-1, c_out, self.rank) @ right.view(-1, self.rank, c_in)            # (B, c_out, c_in)
            kernel = shared * (1 + low_rank / math.sqrt(self.rank))[..., None, None]
        else:                                           # NeRV-Enc, Eq. 3: each number repeated four times, multiplied
            axis, full = 1 + list(self.sides).index(self.expand), self.sides[self.expand]
            values = 1 + values.view(-1, *self.quarter)                             # 1: the bias of the appendix's FC2
            values = values.repeat_interleave(4, axis).narrow(axis, 0, full)        # (B, c_out, c_in, k*k)
            kernel = shared * values.unflatten(3, (k, k))
        if self.normalize:
            energy = kernel.square().sum((2, 3, 4), keepdim=True)                   # (B, c_out, 1, 1, 1)
        else:                                           # NeRV-Enc B a: the scale that it starts with, for good
            energy = torch.as_tensor(self.initial_energy, device=kernel.device)
        return kernel * (energy + 1e-8).rsqrt() * self.gain

    def forward(self, x, tokens):
        kind, c_in, c_out, k, _, go, gi, *_ = self.layer
        B, (TB, _, H, W) = len(tokens), x.shape
        by_video = x.view(TB // B, B, c_in, H, W)                                   # (T, B, c_in, H, W)
        if self.assemble:                               # channels of all videos side by side, a group for each video
            y = convolve(by_video.flatten(1, 2), self.kernel(tokens).flatten(0, 1), kind, groups=B)
            y = y.view(TB, c_out, *y.shape[-2:])
            y = y + self.bias.to(y.dtype)[:, None, None]
        else:
            shared = self.shared
            block = shared[:go, :gi] + self.generated(tokens).view(B, go, gi, k, k)             # (B, go, gi, k, k)
            with torch.autocast(x.device.type, enabled=False):                      # sums of squares need float32
                same = shared.float().square().sum((2, 3))                          # (c_out, c_in)
                inside = block.float().square().sum((2, 3, 4)) + same[:go, gi:].sum(1)              # (B, go)
                energy = torch.cat([inside, same[go:].sum(1).expand(B, -1)], 1)                     # (B, c_out)
                scale = ((energy + 1e-8).rsqrt() * self.gain)[:, :, None, None]     # (B, c_out, 1, 1)
            y = convolve(by_video[:, :, :gi].flatten(1, 2), block.flatten(0, 1), kind, groups=B)    # (T, B*go, H', W')
            y = y.view(TB // B, B, go, *y.shape[-2:])                               # (T, B, go, H', W')
            scale, bias = scale.to(y.dtype), self.bias.to(y.dtype)[:, None, None]   # or autocast's bfloat16 ends here
            if gi < c_in:
                y = y + convolve(x[:, gi:], shared[:go, gi:], kind).view_as(y)
            y = torch.addcmul(bias[:go], y, scale[:, :go])
            if go < c_out:
                rest = convolve(x, shared[go:], kind).view(TB // B, B, c_out - go, *y.shape[-2:])
                y = torch.cat([y, torch.addcmul(bias[go:], rest, scale[:, go:])], 2)                # (T, B, c_out, ..)
            y = y.flatten(0, 1)                                                     # (T*B, c_out, H', W')
        return F.pixel_shuffle(y, self.layer.shuffle) if self.layer.shuffle > 1 else y


class PlainConv2d(nn.Module):
    """The same layer with one video's kernel filled in. Shapes: (T, c_in, H, W) -> (T, c_out, H', W')."""

    def __init__(self, conv, tokens):
        super().__init__()
        self.layer = conv.layer
        self.register_buffer("kernel", conv.kernel(tokens[None])[0].detach())       # (c_out, c_in, k, k)
        self.register_buffer("bias", conv.bias.detach().clone())

    def forward(self, x):
        y = convolve(x, self.kernel, self.layer.kind)
        y = y + self.bias.to(y.dtype)[:, None, None]
        return F.pixel_shuffle(y, self.layer.shuffle) if self.layer.shuffle > 1 else y


# ---------------------------------------------------------------------------------------------- the decoder

def layer_token_slices(cfg, layers):
    """NeRV-Enc's layer-adaptive tokens: "4x256,0x0" gives the first layer 4 tokens of 256 numbers, the second none.

    Returns the rows (slices) and the columns (counts) of the (N, d) tokens that each layer reads.
    Raises: SystemExit when they are not one pair a layer, or do not add up to cfg.tokens rows of cfg.token_dim columns
    Source: NeRV-Enc A.5. Choice: all stand in one (N, d) tensor, so that everything else need not know; the shorter
            ones leave the end of their rows unused (zero)
    """
    pairs = [[int(n) for n in pair.split("x")] for pair in cfg.layer_tokens.split(",")]
    counts, columns = zip(*pairs)
    if len(pairs) != layers or sum(counts) != cfg.tokens or max(columns) != cfg.token_dim:
        raise SystemExit(f"--layer-tokens {cfg.layer_tokens} needs {layers} pairs, --tokens {sum(counts)} and "
                         f"--token-dim {max(columns)}")
    ends = np.cumsum(counts).tolist()
    return [slice(end - count, end) for count, end in zip(counts, ends)], columns


def upsample_side(x, width):
    """Parameter-free side connection: bilinear x2, channels repeated where the block widens (paper A.1; choice)."""
    x = bilinear(x)
    return x.repeat(1, width // x.shape[1], 1, 1) if x.shape[1] != width else x


def render(layers, convs, x, side):
    """Run the layers on an embedding; the same walk for the batched and for the instantiated network.

    Shapes:  x (n, 48, h, w) -> (n, 3, H, W) in [-1, 1]; layers and convs go in pairs, convs[i](x) -> y
    Source:  paper Table A1; GELU in all blocks and tanh at the end: A.2; residual sums, bilinear: Sec. 3.2, A.1
    """
    x, rgb = F.gelu(convs[0](x)), None
    level_in, following = x, layers[2:] + layers[-1:]   # the layer after each one; the last stands for itself
    for layer, after, conv in zip(layers[1:], following, convs[1:]):
        if layer.kind == "rgb":                         # once, at the end; with side "skip" at every size, summed
            y = conv(x)                                                             # (n, 3, size, size)
            rgb = y if rgb is None else y + upsample_side(rgb, 3)
            continue
        x = F.gelu(conv(x))                                                         # (n, c, size, size)
        if side == "residual" and after.level != layer.level:                       # the level ends here
            x = (x + upsample_side(level_in, x.shape[1])) / math.sqrt(2)            # unit scale, as StyleGAN2
            level_in = x
    return rgb.tanh()


class PlainNeRV(nn.Module):
    """One video as the network that it is. Shapes: frame (T,) float -> (T, 3, H, W) in [-1, 1]."""

    def __init__(self, decoder, tokens):
        super().__init__()
        self.cfg = decoder.cfg
        self.layers = decoder.layers
        self.convs = nn.ModuleList(PlainConv2d(conv, tokens) for conv in decoder.convs)
        self.to(memory_format=torch.channels_last)      # no groups here: the layout that dense convolutions are best at

    def forward(self, frame):
        c = self.cfg
        x = positional_embedding(frame, c.pe_size, c.pe_dim, c.pe_base)             # (T, 48, h, w)
        x = x.contiguous(memory_format=torch.channels_last)
        return render(self.layers, self.convs, x[:, :self.layers[0].c_in], c.side)


class GenerativeNeRV(nn.Module):
    """The video decoder: a batch of weight tokens and frame indices to a batch of videos.

    Shapes:  tokens (B, N, d), frame (T,) float -> (B, T, 3, H, W) in [-1, 1]
    Units:   tokens ~ N(0, 1); frame on the training grid, fractional or beyond the end allowed
    Source:  paper Sec. 3.1-3.2, Tables A1, 2a-2f
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.layers = cfg, layer_plan(cfg)
        plan, head = self.layers, None
        rows, columns = [slice(0, cfg.tokens)] * len(plan), [cfg.token_dim] * len(plan)
        if cfg.layer_tokens:                            # NeRV-Enc: each layer its own tokens, of its own length
            rows, columns = layer_token_slices(cfg, len(plan))
        elif cfg.reuse == "none":                       # Table 2b; choice: tokens shared out by block size
            if cfg.tokens < len(plan):
                raise SystemExit(f"--reuse none needs at least {len(plan)} tokens, one for each layer")
            # One token for every layer, the others by block size, rounded on the running sum so that they add up to N.
            sizes = torch.tensor([p.gen_out * p.gen_in * p.k ** 2 for p in plan]).double()
            cuts = (1 + (sizes / sizes.sum() * (cfg.tokens - len(plan))).cumsum(0).round() + torch.arange(len(plan)))
            ends = cuts.long().tolist()
            rows = [slice(a, b) for a, b in zip([0] + ends[:-1], ends)]
        elif cfg.reuse == "direct":                     # Table 2b; choice: one head, every layer reads the same values
            if cfg.parameterization != "channel":
                raise SystemExit("--reuse direct is defined for --parameterization channel only")
            most = max(-(-p.gen_out * p.gen_in * p.k ** 2 // cfg.tokens) for p in plan)
            head = nn.Linear(cfg.token_dim, most, bias=False)
        self.convs = nn.ModuleList(ModulatedConv2d(p, cfg, r, c, head) for p, r, c in zip(plan, rows, columns))
        used = torch.zeros(cfg.tokens, cfg.token_dim, dtype=torch.bool)             # (N, d): all, but for NeRV-Enc
        for r, c in zip(rows, columns):
            used[r, :c] = True
        self.register_buffer("used", used, persistent=False)

    def forward(self, tokens, frame):
        B, N, d = tokens.shape
        c = self.cfg
        x = positional_embedding(frame, c.pe_size, c.pe_dim, c.pe_base)             # (T, 48, h, w)
        x = x[:, :self.layers[0].c_in]                                              # NeRV-Dec reads time alone
        x = x[:, None].expand(-1, B, -1, -1, -1).flatten(0, 1)                      # (T*B, 48, h, w)
        convs = [partial(conv, tokens=tokens) for conv in self.convs]
        video = render(self.layers, convs, x, c.side)                               # (T*B, 3, H, W)
        return video.view(len(frame), B, 3, *video.shape[-2:]).transpose(0, 1)      # (B, T, 3, H, W)

    def instantiate(self, tokens):
        """One video's tokens assembled into a plain CNN, kernels normalised once: the cheap way to play one video.

        Shapes:  tokens (N, d) -> PlainNeRV, frame (T,) -> (T, 3, H, W); equals forward(tokens[None], frame)[0]
        """
        return PlainNeRV(self, tokens)


# ---------------------------------------------------------------------------------------------- Table A1

def flops(layer):
    """Floating-point operations of a layer for one frame, two for each multiply-add."""
    applied = layer.size // (2 if layer.kind == "transposed" else layer.shuffle)
    return 2 * layer.c_in * layer.c_out * layer.k ** 2 * applied ** 2


def main(argv=None):
    """Print Table A1 for a width and a resolution, layer by layer."""
    parser = argparse.ArgumentParser(description="Table A1 of the paper: the layers of the decoder.")
    parser.add_argument("--model", default="S", help="S, B, L or a number of channels (default: S)")
    parser.add_argument("--resolution", type=int, default=128, help="height = width in pixels (default: 128)")
    parser.add_argument("--gen-channels", type=int, default=64, help="generated block of a D -> D kernel (default: 64)")
    args = parser.parse_args(argv)
    cfg = SimpleNamespace(**vars(args), pe_size=8, pe_dim=16, upsample="transposed", side="residual")
    plan = layer_plan(cfg)
    row = "{:<12} {:>18} {:>18} {:>18} {:>11} {:>12}"
    print(row.format("layer", "feature map", "kernel in, out", "generated block", "parameters", "GFLOP/frame"))
    for p in plan:
        print(row.format(p.kind, f"[{p.c_out}, {p.size}, {p.size}]", f"[{p.c_in}, {p.c_out}, {p.k}, {p.k}]",
                         f"[{p.gen_in}, {p.gen_out}, {p.k}, {p.k}]", f"{p.c_in * p.c_out * p.k ** 2:,}",
                         f"{flops(p) / 1e9:.3f}"))
    total, made = sum(p.c_in * p.c_out * p.k ** 2 for p in plan), sum(p.gen_in * p.gen_out * p.k ** 2 for p in plan)
    print(f"kernels {total / 1e6:.3f}M, of which generated for each video {made / 1e6:.3f}M ({made / total:.1%}); "
          f"{16 * sum(map(flops, plan)) / 1e12:.3f} TFLOP for 16 frames")


if __name__ == "__main__":
    main()
