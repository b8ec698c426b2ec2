"""Files are written whole or not at all; pictures survive the way to the disk and back; broken ones are named."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kinesplat.errors import InputError, unknown
from kinesplat.files import colours_of, folder_written_whole, read_image, read_mask, write_gif, write_png, written_whole


def test_an_interrupted_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("old")

    def interrupted() -> None:
        with written_whole(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_finished_write_replaces_the_file_and_keeps_the_usual_permissions(tmp_path: Path) -> None:
    path, plain = tmp_path / "a.txt", tmp_path / "b.txt"
    plain.write_text("x")
    with written_whole(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert path.stat().st_mode == plain.stat().st_mode


def test_a_missing_folder_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot write .*nowhere"), written_whole(tmp_path / "nowhere" / "a.txt"):
        pass


def test_png_round_trip(tmp_path: Path) -> None:
    rgb = torch.randint(0, 256, (5, 7, 3)).float() / 255.0
    torch.testing.assert_close(read_image(write_png(tmp_path / "a.png", rgb)), rgb)
    mask = torch.randint(0, 256, (5, 7)).float() / 255.0
    torch.testing.assert_close(read_mask(write_png(tmp_path / "m.png", mask)), mask)
    depth = torch.randint(0, 65536, (5, 7), dtype=torch.int32)
    write_png(tmp_path / "d.png", depth)
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "d.png")), depth.numpy())


def test_gif_has_all_frames(tmp_path: Path) -> None:
    frames = [torch.full((4, 6, 3), i / 5) for i in range(5)]
    with Image.open(write_gif(tmp_path / "a.gif", frames, 1.0)) as film:
        assert getattr(film, "n_frames", 1) == 5
        assert film.size == (6, 4)


@pytest.mark.parametrize("content", [None, b"", b"not a picture", "half"])
def test_broken_pictures_are_named(tmp_path: Path, content: bytes | str | None) -> None:
    path = tmp_path / "photo.png"
    if content == "half":
        write_png(path, torch.rand(64, 64, 3))
        path.write_bytes(path.read_bytes()[:2000])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    for read in (read_image, read_mask):
        with pytest.raises(InputError, match=r"photo\.png"):
            read(path)


def test_an_alpha_channel_is_refused(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="alpha channel"):
        read_image(tmp_path / "a.png")


def test_link_colours_are_distinct_and_nothing_is_white() -> None:
    colours = colours_of(torch.arange(-1, 20)[None])[0]
    assert (colours[0] == 1.0).all()
    assert torch.cdist(colours, colours).fill_diagonal_(1.0).min() > 0.05


def test_unknown_names_list_the_near_ones() -> None:
    text = unknown("robot", "pandda", ["panda", "go1", "h1"])
    assert "'panda'" in text
    assert "go1, h1, panda" in text


def test_a_folder_is_written_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for content in ("first", "second"):
        with folder_written_whole(path) as temporary:
            (temporary / content).write_text(content)
        assert [file.name for file in path.iterdir()] == [content]

    def interrupted() -> None:
        with folder_written_whole(path) as temporary:
            (temporary / "third").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [file.name for file in path.iterdir()] == ["second"]
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]
    with pytest.raises(InputError, match="cannot write"), folder_written_whole(tmp_path / "no" / "folder"):
        pass
