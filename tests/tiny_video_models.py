"""Video models of the real classes, untrained and tiny, for tests."""

from typing import Any

import torch

from kinesplat.vision.video_diffusion import TextSteeredVideo
from kinesplat.vision.video_pipelines import Sampling

SIZE, FRAMES = 16, 3


def tiny_model(seed: int = 0) -> TextSteeredVideo:
    """Stable Video Diffusion with a text model, 16 px, three frames."""
    import diffusers

    torch.manual_seed(seed)
    encoder, tokenizer = tiny_text_model()
    unet = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=SIZE // 2,
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=(32, 32),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        layers_per_block=1,
        cross_attention_dim=16,
        num_attention_heads=2,
        num_frames=FRAMES,
    )
    vae = diffusers.AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 2, block_out_channels=(32, 32), layers_per_block=1, sample_size=SIZE
    )
    return TextSteeredVideo(unet, vae, svd_scheduler(), encoder, tokenizer, Sampling(steps=2, noise=0.0))


def svd_scheduler() -> Any:
    """The scheduler as `stabilityai/stable-video-diffusion-img2vid-xt` has it."""
    import diffusers

    return diffusers.EulerDiscreteScheduler(
        beta_end=0.012,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        interpolation_type="linear",
        prediction_type="v_prediction",
        sigma_max=700.0,
        sigma_min=0.002,
        steps_offset=1,
        timestep_spacing="leading",
        timestep_type="continuous",
        use_karras_sigmas=True,
    )


def tiny_text_model(dimension: int = 16) -> tuple[Any, Any]:
    """A CLIP text model whose tokens are letters."""
    import transformers

    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=16,
        projection_dim=dimension,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    vocabulary = {token: number for number, token in enumerate(tokens)}
    encoder = transformers.CLIPTextModelWithProjection(config).eval()
    return encoder, transformers.CLIPTokenizer(vocab=vocabulary, merges=[])
