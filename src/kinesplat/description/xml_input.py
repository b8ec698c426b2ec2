"""XML of strangers: read whole, bounded, without entities."""

from pathlib import Path
from xml.etree.ElementTree import Element, ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

from kinesplat.errors import DescriptionError

MAX_BYTES = 64_000_000
MAX_DEPTH = 200


def read_text(path: Path) -> bytes:
    """Content of a description file.

    Raises:
        DescriptionError: it does not exist, cannot be read, is empty or absurdly large.
    """
    if not path.is_file():
        raise DescriptionError(f"{path}: {'is a folder, not a file' if path.is_dir() else 'no such file'}")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DescriptionError(f"{path}: {path.stat().st_size:,} bytes; descriptions end at {MAX_BYTES:,}")
        text = path.read_bytes()
    except OSError as error:
        raise DescriptionError(f"{path}: {error.strerror}") from error
    if not text.strip():
        raise DescriptionError(f"{path}: the file is empty")
    return text


def parsed(text: bytes | str, source: str, root: str) -> Element:
    """Root element, which must be called `root`; document types and entities are refused.

    Raises:
        DescriptionError: broken XML (with line and column), entities, another root element, absurd nesting.
    """
    try:
        element = fromstring(text, forbid_dtd=True)
    except ParseError as error:
        raise DescriptionError(f"{source}: broken XML: {error}") from error
    except DefusedXmlException as error:
        raise DescriptionError(f"{source}: XML with a document type or entities is refused ({error})") from error
    except (ValueError, LookupError) as error:
        raise DescriptionError(f"{source}: broken XML: {error}") from error
    if element.tag != root:
        raise DescriptionError(f"{source}: root element is <{element.tag}>; expected <{root}>")
    if _deeper_than(element, MAX_DEPTH):
        raise DescriptionError(f"{source}: elements are nested more than {MAX_DEPTH} deep")
    return element


def _deeper_than(element: Element, limit: int) -> bool:
    level = [element]
    for _ in range(limit):
        level = [child for parent in level for child in parent]
        if not level:
            return False
    return True
