"""The small video model of `tabletop.py`."""

from collections.abc import Sequence

from kinesplat.vision.video_diffusion import TextSteeredVideo


def small_model(size: int, frames: int, sentences: Sequence[str]) -> TextSteeredVideo:
    """Untrained; the classes of Stable Video Diffusion, three million weights, letters of the sentences for tokens.

    Args:
        size: of the square videos [px].
        frames: of a video.
        sentences: all that will be said.
    """
    import diffusers
    import transformers

    tokens = ["<|startoftext|>", "<|endoftext|>"]
    letters = sorted(set("".join(sentences)) - {" "})
    vocabulary = {token: i for i, token in enumerate([*tokens, *letters, *(letter + "</w>" for letter in letters)])}
    text = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        initializer_factor=2.0,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return TextSteeredVideo(
        unet=diffusers.UNetSpatioTemporalConditionModel(
            sample_size=size // 4,
            in_channels=16,
            out_channels=8,
            down_block_types=("DownBlockSpatioTemporal", *["CrossAttnDownBlockSpatioTemporal"] * 2),
            up_block_types=(*["CrossAttnUpBlockSpatioTemporal"] * 2, "UpBlockSpatioTemporal"),
            block_out_channels=(32, 64, 64),
            addition_time_embed_dim=16,
            projection_class_embeddings_input_dim=48,
            layers_per_block=1,
            cross_attention_dim=32,
            num_attention_heads=4,
            num_frames=frames,
        ),
        vae=diffusers.AutoencoderKLTemporalDecoder(
            down_block_types=("DownEncoderBlock2D",) * 3,
            block_out_channels=(32, 32, 64),
            layers_per_block=1,
            latent_channels=8,
            sample_size=size,
            force_upcast=False,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(
            prediction_type="v_prediction",
            timestep_type="continuous",
            timestep_spacing="leading",
            use_karras_sigmas=True,
            sigma_min=0.01,
            sigma_max=80.0,
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
        ),
        text_encoder=transformers.CLIPTextModelWithProjection(text).eval(),
        tokenizer=transformers.CLIPTokenizer(vocab=vocabulary, merges=[]),
    )
