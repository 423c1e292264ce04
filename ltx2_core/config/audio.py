"""Configuration of the audio path: mel front end, audio autoencoder, vocoders."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .fields import ConfigError, Section

# every released model: 16 kHz input, 160 samples a mel frame
SAMPLE_RATE_HZ = 16_000
HOP_LENGTH = 160
MEL_FRAMES_PER_SECOND = SAMPLE_RATE_HZ // HOP_LENGTH
MEL_BINS = 64

_MAX_OUTPUT_RATE_HZ = 192_000


@dataclass(frozen=True, slots=True, kw_only=True)
class MelConfig:
    """Log-mel spectrogram of a waveform. n_fft and hop_length in samples, min_hz and max_hz in Hz."""

    sample_rate: int
    n_fft: int
    hop_length: int
    mel_bins: int
    min_hz: float
    max_hz: float

    def __post_init__(self):
        if not 0 <= self.min_hz < self.max_hz <= self.sample_rate / 2:
            raise ConfigError(
                f"mel range {self.min_hz:g} to {self.max_hz:g} Hz does not fit 0 to {self.sample_rate / 2:g} Hz, "
                f"half of the sample rate"
            )

    def num_frames(self, num_samples: int) -> int:
        """Mel frames of a waveform; the transform is centred."""
        return 1 + num_samples // self.hop_length


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioVAEConfig:
    """Audio autoencoder over stereo log-mel spectrograms.

    widths: channels of each level, finest first. latent_channels: z_channels of the file.
    """

    widths: tuple[int, int, int]
    num_res_blocks: int
    latent_channels: int
    mel: MelConfig

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> AudioVAEConfig:
        """Read section ``audio_vae`` of a checkpoint's configuration; ConfigError for what is not supported."""
        section = Section("config", config).section("audio_vae")
        params = section.section("model").section("params")
        network = params.section("ddconfig")
        params.only("sampling_rate", SAMPLE_RATE_HZ)
        mel = _read_mel(section.section("preprocessing", {}))

        network.only("in_channels", 2)
        network.only("out_ch", 2)
        network.only("double_z", True)
        network.only("norm_type", "pixel")
        network.only("causality_axis", "height")
        network.only("mel_bins", mel.mel_bins)
        # the reference puts attention in when these two are absent, so they have to be there
        _must_be(network, "attn_resolutions", [])
        _must_be(network, "mid_block_add_attention", False)

        base = network.integer("ch", 128, high=4096)
        multipliers = network.integers("ch_mult", (1, 2, 4), length=3)
        if not all(1 <= m <= 64 for m in multipliers):
            raise ConfigError(f"{network.name}.ch_mult must be factors from 1 to 64, found {list(multipliers)}")
        vae = cls(
            widths=(base * multipliers[0], base * multipliers[1], base * multipliers[2]),
            num_res_blocks=network.integer("num_res_blocks", 2, high=16),
            latent_channels=network.integer("z_channels", 8, high=1024),
            mel=mel,
        )
        # the file's statistics have ``ch`` entries and are applied to tokens
        if base != vae.token_width:
            raise ConfigError(
                f"{network.name}.ch is {base}, but {vae.latent_channels} latent channels of {vae.latent_mel_bins} mel "
                f"bins make {vae.token_width} statistics; the two must be equal"
            )
        return vae

    @property
    def time_factor(self) -> int:
        """Mel frames per latent, and mel bins per latent mel bin."""
        return 2 ** (len(self.widths) - 1)

    @property
    def latent_mel_bins(self) -> int:
        return self.mel.mel_bins // self.time_factor

    @property
    def token_width(self) -> int:
        return self.latent_channels * self.latent_mel_bins

    @property
    def sample_rate(self) -> int:
        return self.mel.sample_rate

    @property
    def latents_per_second(self) -> float:
        return self.mel.sample_rate / self.mel.hop_length / self.time_factor

    def num_latents(self, mel_frames: int) -> int:
        """Latent frames that encoding makes."""
        return math.ceil(mel_frames / self.time_factor)

    def num_mel_frames(self, latents: int) -> int:
        """Mel frames that decoding makes: causality in time drops all but one frame of the first latent."""
        return max(self.time_factor * latents - (self.time_factor - 1), 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorConfig:
    """One waveform generator: HiFi-GAN, or BigVGAN where ``anti_aliased``.

    initial_width: channels before the first upsampling; each of the stages halves them.
    upsample_rates, upsample_kernels: stride and kernel size of each stage.
    """

    anti_aliased: bool
    initial_width: int
    upsample_rates: tuple[int, ...]
    upsample_kernels: tuple[int, ...]
    output_bias: bool
    final_activation: Literal["tanh", "clamp", "none"]

    @classmethod
    def from_section(cls, section: Section) -> GeneratorConfig:
        section.only("stereo", True)
        section.only("resblock_kernel_sizes", [3, 7, 11])
        section.only("resblock_dilation_sizes", [[1, 3, 5]] * 3)
        anti_aliased = section.only("resblock", "1", "AMP1") == "AMP1"
        if anti_aliased:
            _must_be(section, "activation", "snakebeta")

        rates = section.integers("upsample_rates")
        kernels = section.integers("upsample_kernel_sizes", length=len(rates))
        width = section.integer("upsample_initial_channel", high=16_384)
        _check_stages(section.name, width, rates, kernels)
        return cls(
            anti_aliased=anti_aliased,
            initial_width=width,
            upsample_rates=rates,
            upsample_kernels=kernels,
            output_bias=section.flag("use_bias_at_final", True),
            final_activation=_read_final_activation(section),
        )

    @property
    def samples_per_frame(self) -> int:
        return math.prod(self.upsample_rates)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels before the first stage and after each stage."""
        return tuple(self.initial_width >> i for i in range(len(self.upsample_rates) + 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class BandwidthExtensionConfig:
    """Second generator that lifts 16 kHz to 48 kHz, and the causal log-mel that it reads."""

    generator: GeneratorConfig
    ratio: int
    n_fft: int
    hop_length: int

    @classmethod
    def from_section(cls, section: Section) -> BandwidthExtensionConfig:
        section.only("num_mels", MEL_BINS)
        section.only("input_sampling_rate", SAMPLE_RATE_HZ)
        n_fft = section.integer("n_fft", high=16_384)
        section.only("win_size", n_fft)
        hop_length = section.integer("hop_length", high=n_fft)
        if HOP_LENGTH % hop_length:
            raise ConfigError(f"{section.name}.hop_length must divide {HOP_LENGTH}, found {hop_length}")
        generator = GeneratorConfig.from_section(section)
        # the resampler of the skip path is the reference's filter for a factor of three
        ratio = section.only("output_sampling_rate", 3 * SAMPLE_RATE_HZ) // SAMPLE_RATE_HZ
        _check_total(section.name, generator, ratio * hop_length)
        return cls(generator=generator, ratio=ratio, n_fft=n_fft, hop_length=hop_length)


@dataclass(frozen=True, slots=True, kw_only=True)
class VocoderConfig:
    """Log-mel to waveform: one generator, or a 16 kHz generator with bandwidth extension to 48 kHz."""

    generator: GeneratorConfig
    bandwidth_extension: BandwidthExtensionConfig | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> VocoderConfig:
        """Read section ``vocoder`` of a checkpoint's configuration; ConfigError for what is not supported."""
        section = Section("config", config).section("vocoder")
        if section.has("bwe"):
            main = section.section("vocoder")
            generator = GeneratorConfig.from_section(main)
            _check_total(main.name, generator, HOP_LENGTH)
            return cls(
                generator=generator,
                bandwidth_extension=BandwidthExtensionConfig.from_section(section.section("bwe")),
            )
        vocoder = cls(generator=GeneratorConfig.from_section(section))
        section.only("output_sampling_rate", vocoder.sample_rate)
        return vocoder

    @property
    def sample_rate(self) -> int:
        """Of the waveform, in Hz."""
        return self.samples_per_mel_frame * MEL_FRAMES_PER_SECOND

    @property
    def samples_per_mel_frame(self) -> int:
        extension = self.bandwidth_extension
        return self.generator.samples_per_frame * (1 if extension is None else extension.ratio)


def _read_mel(preprocessing: Section) -> MelConfig:
    stft = preprocessing.section("stft", {})
    mel = preprocessing.section("mel", {})
    n_fft = stft.integer("filter_length", 1024, low=16, high=16_384)
    stft.only("win_length", n_fft)
    # token time stamps assume it; the transform itself is centred all the same
    stft.only("causal", True)
    return MelConfig(
        sample_rate=SAMPLE_RATE_HZ,
        n_fft=n_fft,
        hop_length=stft.only("hop_length", HOP_LENGTH),
        mel_bins=mel.only("n_mel_channels", MEL_BINS),
        min_hz=mel.number("mel_fmin", 0.0),
        max_hz=mel.number("mel_fmax", SAMPLE_RATE_HZ / 2),
    )


def _read_final_activation(section: Section) -> Literal["tanh", "clamp", "none"]:
    if not section.flag("apply_final_activation", True):
        return "none"
    return "tanh" if section.flag("use_tanh_at_final", True) else "clamp"


def _check_stages(name: str, width: int, rates: tuple[int, ...], kernels: tuple[int, ...]) -> None:
    if not rates or min(rates) < 1 or math.prod(rates) > _MAX_OUTPUT_RATE_HZ // MEL_FRAMES_PER_SECOND:
        raise ConfigError(
            f"{name}.upsample_rates must be whole numbers from 1 whose product makes at most {_MAX_OUTPUT_RATE_HZ} Hz, "
            f"found {list(rates)}"
        )
    # only then does a stage multiply the length by its rate exactly
    if any(k < r or (k - r) % 2 or k > 256 for r, k in zip(rates, kernels, strict=True)):
        raise ConfigError(
            f"{name}.upsample_kernel_sizes must exceed upsample_rates {list(rates)} by even numbers and stay below 257, "
            f"found {list(kernels)}"
        )
    if width % 2 ** len(rates):
        raise ConfigError(
            f"{name}.upsample_initial_channel must be a multiple of {2 ** len(rates)} for {len(rates)} stages, "
            f"found {width}"
        )


def _check_total(name: str, generator: GeneratorConfig, expected: int) -> None:
    if generator.samples_per_frame != expected:
        raise ConfigError(
            f"{name}.upsample_rates {list(generator.upsample_rates)} make {generator.samples_per_frame} samples a "
            f"frame; the sampling rates and hop lengths need {expected}"
        )


def _must_be(section: Section, key: str, value: Any) -> None:
    """For keys whose absence means something else than the one supported value."""
    if section.raw(key) != value:
        raise ConfigError(f"{section.name}.{key} is {section.raw(key)!r}; this engine supports {value!r}")
