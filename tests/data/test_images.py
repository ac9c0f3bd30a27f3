"""Image and mask files against the arrays they were written from, and damaged files against their message."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from bti_fast.data import read_image, read_mask
from bti_fast.errors import UserError
from tests.data.files import png_bytes, png_of_size, save, square_mask, texture


def refusal(path, read=lambda path: read_image(path, 1)) -> str:
    with pytest.raises(UserError) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message and path.name in message
    return message


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp"])
def test_8_bit_grey_is_value_over_255(tmp_path, suffix):
    grey = texture(0)
    image = read_image(save(tmp_path / f"a.{suffix}", grey), 1)
    assert image.dtype == np.float32 and image.shape == (1, 40, 50)
    np.testing.assert_array_equal(np.rint(image[0] * 255), grey)
    assert image.max() <= 1 and np.abs(image[0] - grey / 255.0).max() < 1e-7


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_value_over_65535(tmp_path, suffix):
    grey = np.random.default_rng(0).integers(0, 65536, (7, 9), dtype=np.uint16)
    image = read_image(save(tmp_path / f"a.{suffix}", grey), 3)
    assert image.shape == (3, 7, 9)
    for plane in image:
        np.testing.assert_allclose(plane, grey / 65535.0, atol=1e-7)


def test_big_endian_16_bit_tiff_equals_little_endian(tmp_path):
    grey = np.random.default_rng(1).integers(0, 65536, (5, 6), dtype=np.uint16)
    entries = [
        (256, 4, 6),
        (257, 4, 5),
        (258, 3, 16 << 16),
        (259, 3, 1 << 16),
        (262, 3, 1 << 16),
        (273, 4, 8 + 2 + 9 * 12 + 4),
        (277, 3, 1 << 16),
        (278, 4, 5),
        (279, 4, 60),
    ]
    header = b"MM\x00*" + struct.pack(">I", 8) + struct.pack(">H", len(entries))
    body = b"".join(struct.pack(">HHII", tag, kind, 1, value) for tag, kind, value in entries)
    path = tmp_path / "big.tif"
    path.write_bytes(header + body + struct.pack(">I", 0) + grey.astype(">u2").tobytes())
    np.testing.assert_allclose(read_image(path, 1)[0], grey / 65535.0, atol=1e-7)


def test_colour_keeps_channels_and_greys_by_luma(tmp_path):
    colour = np.random.default_rng(2).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    path = save(tmp_path / "a.png", colour)
    np.testing.assert_allclose(read_image(path, 3), colour.transpose(2, 0, 1) / 255.0, atol=1e-7)
    luma = colour @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(read_image(path, 1)[0], luma / 255, atol=0.6 / 255)


def test_transparency_is_laid_over_black(tmp_path):
    pixels = np.full((2, 2, 4), 200, dtype=np.uint8)
    pixels[..., 3] = [[255, 0], [128, 255]]
    image = read_image(save(tmp_path / "a.png", pixels), 1)[0]
    np.testing.assert_allclose(image * 255, [[200, 0], [100.4, 200]], atol=1)
    pixels[..., 3] = 0
    np.testing.assert_allclose(read_image(save(tmp_path / "b.png", pixels), 1)[0] * 255, 200, atol=1e-4)


def test_palette_and_one_bit(tmp_path):
    grey = texture(3)
    palette = Image.fromarray(np.stack([grey] * 3, axis=-1)).quantize(256)
    palette.save(tmp_path / "p.png")
    np.testing.assert_allclose(read_image(tmp_path / "p.png", 1)[0], np.asarray(palette.convert("L")) / 255.0)
    Image.fromarray(grey > 127).save(tmp_path / "1.png")
    np.testing.assert_array_equal(read_image(tmp_path / "1.png", 1)[0], (grey > 127).astype(np.float32))


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize(
    ("tag", "upright"),
    [(1, lambda a: a), (3, lambda a: a[::-1, ::-1]), (6, lambda a: np.rot90(a, -1)), (8, np.rot90)],
)
def test_exif_orientation_is_applied(tmp_path, suffix, tag, upright):
    grey = texture(4)
    exif = Image.Exif()
    exif[0x0112] = tag
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(grey).save(path, exif=exif)
    np.testing.assert_array_equal(np.rint(read_image(path, 1)[0] * 255), upright(grey))


def test_16_bit_tiff_in_which_zero_is_white(tmp_path):
    grey = np.random.default_rng(2).integers(0, 65536, (7, 9), dtype=np.uint16)
    path = save(tmp_path / "a.tif", 65535 - grey, tiffinfo={262: 0, 274: 3})  # half a turn too
    np.testing.assert_allclose(read_image(path, 1)[0], grey[::-1, ::-1] / 65535.0, atol=1e-7)


def test_masks_drawn_in_transparency(tmp_path):
    mask = square_mask()
    black, white = np.zeros((*mask.shape, 3), np.uint8), np.full((*mask.shape, 3), 255, np.uint8)
    stored = {
        "black on nothing": np.dstack([black, mask]),
        "black on white that cannot be seen": np.dstack([np.where(mask[..., None], black, white), mask]),
        "white on nothing": np.dstack([white, mask]),
        "white on black, all opaque": np.dstack([*[mask] * 3, white[..., 0]]),
        "grey": np.dstack([black[..., 0], mask]),
    }
    for name, array in stored.items():
        np.testing.assert_array_equal(
            read_mask(save(tmp_path / f"{name}.png", array)), mask > 0, err_msg=name
        )
    assert not read_mask(save(tmp_path / "empty.png", np.dstack([black, 0 * mask + 255]))).any()
    assert not read_mask(save(tmp_path / "nothing.png", np.dstack([black, 0 * mask]))).any()


def test_masks_of_255_one_bit_and_01_agree(tmp_path):
    mask = square_mask()
    expected = mask > 0
    stored = {
        "255": mask,
        "01": (mask > 0).astype(np.uint8),
        "bit": mask > 0,
        "16": (mask > 0).astype(np.uint16) * 65535,
        "16of8": mask.astype(np.uint16),
        "red": np.stack([mask, 0 * mask, 0 * mask], axis=-1),
    }
    for name, array in stored.items():
        read = read_mask(save(tmp_path / f"{name}.png", array))
        assert read.dtype == bool
        np.testing.assert_array_equal(read, expected, err_msg=name)
    assert not read_mask(save(tmp_path / "none.png", 0 * mask)).any()
    np.testing.assert_array_equal(
        read_mask(save(tmp_path / "grey.png", np.array([[0, 127, 128, 255]], dtype=np.uint8))),
        [[False, False, True, True]],
    )


def test_mask_without_clear_meaning_is_refused(tmp_path):
    labels = np.array([[0, 1, 2]], dtype=np.uint8)
    message = refusal(save(tmp_path / "labels.png", labels), read_mask)
    assert "reach only 2" in message and "0 and 255" in message


def test_missing_empty_text_and_folder(tmp_path):
    assert "no such file" in refusal(tmp_path / "missing.png")
    (tmp_path / "empty.png").touch()
    assert "0 bytes" in refusal(tmp_path / "empty.png")
    (tmp_path / "text.png").write_text("not an image\n" * 20)
    assert "not an image" in refusal(tmp_path / "text.png")
    (tmp_path / "folder.png").mkdir()
    assert "not a file" in refusal(tmp_path / "folder.png")
    assert "damaged" in refusal(tmp_path / ("long" * 100 + ".png"))


def test_eps_is_not_handed_to_an_interpreter(tmp_path):
    stream = io.BytesIO()
    Image.fromarray(texture(0)).save(stream, "EPS")
    (tmp_path / "a.png").write_bytes(stream.getvalue())
    assert "not an image" in refusal(tmp_path / "a.png")


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_truncated_file(tmp_path, format):
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).save(stream, format)
    path = tmp_path / "cut.png"
    path.write_bytes(stream.getvalue()[: len(stream.getvalue()) // 2])
    assert "truncated" in refusal(path)


def test_corrupt_pixels(tmp_path):
    data = bytearray(png_bytes(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)))
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "bad.png").write_bytes(data)
    assert "damaged" in refusal(tmp_path / "bad.png")


def test_too_many_pixels_are_refused_from_the_header(tmp_path):
    (tmp_path / "big.png").write_bytes(png_of_size(9000, 8000))
    assert "9000 x 8000" in refusal(tmp_path / "big.png")
    (tmp_path / "bomb.png").write_bytes(png_of_size(60000, 60000))
    assert "too many pixels" in refusal(tmp_path / "bomb.png")
    small = save(tmp_path / "small.png", texture(0))
    assert "to 1,999 pixels" in refusal(small, lambda path: read_image(path, 1, max_pixels=1999))
    assert read_image(small, 1, max_pixels=2000).shape == (1, 40, 50)


def test_sequences_floats_and_wide_integers_are_refused(tmp_path):
    frames = [Image.fromarray(texture(i)) for i in range(2)]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    assert "several images" in refusal(tmp_path / "two.gif")
    save(tmp_path / "float.tif", np.ones((3, 3), dtype=np.float32))
    assert "floating-point" in refusal(tmp_path / "float.tif")
    save(tmp_path / "wide.tif", np.full((3, 3), 70000, dtype=np.int32))
    assert "70000" in refusal(tmp_path / "wide.tif")


def test_channels_must_be_one_or_three(tmp_path):
    with pytest.raises(UserError, match="channels is 4"):
        read_image(save(tmp_path / "a.png", texture(0)), 4)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")  # Pillow's, on damaged tags
@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "BMP"])
def test_random_damage_gives_an_image_or_one_line(tmp_path, format):
    """Bytes cut or changed anywhere: no other exception than UserError may come out."""
    rng = np.random.default_rng(0)
    stream = io.BytesIO()
    Image.fromarray(texture(1, 24, 24)).save(stream, format)
    whole = stream.getvalue()
    path = tmp_path / "damaged"
    refused = 0
    for round in range(150):
        data = bytearray(whole if round % 3 else whole[: rng.integers(1, len(whole))])
        for position in rng.integers(0, min(len(data), 200), 3):
            data[position] = rng.integers(0, 256)
        path.write_bytes(data)
        try:
            image = read_image(path, 1)
        except UserError as caught:
            assert "\n" not in str(caught)
            refused += 1
        else:
            assert image.dtype == np.float32 and 0 <= image.min() and image.max() <= 1
    assert refused > 20


def test_crc_of_the_bomb_header_is_right():
    """Guards the helper: the bomb must be refused for its size, not for a wrong checksum."""
    data = png_of_size(10, 20)
    assert zlib.crc32(data[12:29]) == struct.unpack(">I", data[29:33])[0]
