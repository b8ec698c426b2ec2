"""Broken descriptions: each is refused with one line that names the file and the element; none hangs or crashes."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import trimesh

from kinesplat.description import load_description
from kinesplat.errors import DescriptionError

BOX = "<geometry><box size='1 1 1'/></geometry>"
MOVE = '<axis xyz="0 0 1"/><limit lower="-1" upper="1"/>'


def robot(body: str) -> str:
    return f'<robot name="r">{body}</robot>'


def visual(content: str) -> str:
    return robot(f'<link name="base"><visual>{content}</visual></link>')


def mesh(name: str, extra: str = "") -> str:
    return visual(f'<geometry><mesh filename="{name}" {extra}/></geometry>')


def joint(kind: str = "revolute", ends: str = "", inner: str = MOVE, name: str = "j") -> str:
    ends = ends or '<parent link="a"/><child link="b"/>'
    return f'<joint name="{name}" type="{kind}">{ends}{inner}</joint>'


def two_links(joints: str) -> str:
    return robot(f'<link name="a"/><link name="b"/>{joints}')


BILLION_LAUGHS = (
    '<?xml version="1.0"?><!DOCTYPE robot [<!ENTITY a "ha">'
    + "".join(f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    + ']><robot name="&i;"><link name="base"/></robot>'
)
EXTERNAL = '<!DOCTYPE robot [<!ENTITY x SYSTEM "file:///etc/passwd">]><robot name="&x;"><link name="base"/></robot>'
BACK = '<joint name="k" type="fixed"><parent link="b"/><child link="a"/></joint>'

URDF = {
    "empty file": ("", ["bad.urdf", "empty"]),
    "blank file": ("  \n ", ["bad.urdf", "empty"]),
    "not XML": ("robot: {links: 3}", ["bad.urdf", "broken XML"]),
    "cut short": ('<robot name="r"><link name="ba', ["bad.urdf", "broken XML", "line 1"]),
    "tags crossed": ('<robot name="r"><link name="a"></robot></link>', ["bad.urdf", "mismatched tag"]),
    "wrong root": ('<sdf version="1.6"><model/></sdf>', ["bad.urdf", "<sdf>", "<robot>"]),
    "binary": ("\x00\x01\x02\x03", ["bad.urdf", "broken XML"]),
    "billion laughs": (BILLION_LAUGHS, ["bad.urdf", "entities"]),
    "external entity": (EXTERNAL, ["bad.urdf", "entities"]),
    "nested a thousand deep": ("<robot>" + "<a>" * 1000 + "</a>" * 1000 + "</robot>", ["bad.urdf", "nested"]),
    "no link": (robot(""), ["bad.urdf", "no <link>"]),
    "link without name": (robot("<link/>"), ["bad.urdf", "<link>", "no name"]),
    "link twice": (robot('<link name="a"/><link name="a"/>'), ["bad.urdf", "link 'a'", "twice"]),
    "joint without name": (two_links(joint(name="")), ["bad.urdf", "<joint>", "no name"]),
    "joint twice": (two_links(joint() + joint()), ["bad.urdf", "joint 'j'", "twice"]),
    "unknown joint type": (two_links(joint("revolut")), ["joint 'j'", "'revolut'", "did you mean 'revolute'"]),
    "no joint type": (two_links(joint("")), ["joint 'j'", "unknown joint type ''"]),
    "no parent": (two_links(joint(ends='<child link="b"/>')), ["joint 'j'", "parent link"]),
    "unknown parent": (two_links(joint(ends='<parent link="c"/><child link="b"/>')), ["joint 'j'", "parent link 'c'"]),
    "unknown child": (two_links(joint(ends='<parent link="a"/><child link="c"/>')), ["joint 'j'", "child link 'c'"]),
    "own child": (two_links(joint(ends='<parent link="b"/><child link="b"/>')), ["link 'b'", "circle"]),
    "circle": (two_links(joint() + BACK), ["link 'a'", "circle"]),
    "two parents": (
        robot('<link name="a"/><link name="b"/><link name="c"/>' + joint()
              + joint(ends='<parent link="c"/><child link="b"/>', name="k")),
        ["link 'b'", "two parents", "'j'", "'k'"],
    ),
    "two roots": (robot('<link name="a"/><link name="b"/>'), ["'a'", "'b'", "one root"]),
    "limits reversed": (
        two_links(joint(inner='<limit lower="1" upper="-1"/>')), ["joint 'j'", "reversed", "lower 1", "upper -1"],
    ),
    "limit not a number": (two_links(joint(inner='<limit lower="x" upper="1"/>')), ["joint 'j'", "<limit lower>"]),
    "limit NaN": (two_links(joint(inner='<limit lower="nan" upper="1"/>')), ["joint 'j'", "not finite"]),
    "axis of zero": (two_links(joint(inner='<axis xyz="0 0 0"/>')), ["joint 'j'", "axis", "no direction"]),
    "axis of two numbers": (two_links(joint(inner='<axis xyz="0 1"/>')), ["joint 'j'", "<axis xyz>", "2 number(s)"]),
    "axis without numbers": (two_links(joint(inner="<axis/>")), ["joint 'j'", "<axis xyz>"]),
    "origin of words": (two_links(joint(inner='<origin xyz="a b c"/>')), ["joint 'j'", "<origin xyz>", "'a b c'"]),
    "origin infinite": (two_links(joint(inner='<origin xyz="inf 0 0"/>')), ["joint 'j'", "not finite"]),
    "origin on the moon": (two_links(joint(inner='<origin xyz="4e8 0 0"/>')), ["joint 'j'", "more than 1000 m"]),
    "rpy of two numbers": (two_links(joint(inner='<origin rpy="0 1"/>')), ["joint 'j'", "<origin rpy>"]),
    "mimics nobody": (two_links(joint(inner=MOVE + '<mimic joint="k"/>')), ["joint 'j'", "mimicked joint 'k'"]),
    "mimics itself": (two_links(joint(inner=MOVE + '<mimic joint="j"/>')), ["bad.urdf", "mimics itself", "j -> j"]),
    "mimics by a word": (
        two_links(joint(inner=MOVE + '<mimic joint="j" multiplier="two"/>')), ["joint 'j'", "<mimic multiplier>"],
    ),
    "no shape": (visual("<geometry/>"), ["link 'base' visual 0", "0 shapes"]),
    "no geometry": (visual(""), ["link 'base' visual 0", "0 shapes"]),
    "unknown shape": (visual("<geometry><cone/></geometry>"), ["link 'base' visual 0", "unknown shape 'cone'"]),
    "box of one number": (visual("<geometry><box size='1'/></geometry>"), ["visual 0 <box>", "1 number(s)"]),
    "box without size": (visual("<geometry><box/></geometry>"), ["visual 0 <box>", "0 number(s)"]),
    "box of negative size": (visual("<geometry><box size='1 -1 1'/></geometry>"), ["<box>", "greater than 0"]),
    "box of absurd size": (visual("<geometry><box size='1 1 1e30'/></geometry>"), ["<box>", "more than 1000 m"]),
    "sphere of no radius": (visual("<geometry><sphere radius='0'/></geometry>"), ["<sphere>", "greater than 0"]),
    "cylinder without length": (visual("<geometry><cylinder radius='1'/></geometry>"), ["<cylinder> length"]),
    "colour of two numbers": (
        visual(BOX + '<material name="m"><color rgba="1 0"/></material>'), ["material 'm'", "2 number(s)", "3 or 4"],
    ),
    "colour of a word": (visual(BOX + '<material name="m"><color rgba="red"/></material>'), ["material 'm'", "'red'"]),
    "texture missing": (
        visual(BOX + '<material name="m"><texture filename="no.png"/></material>'), ["<texture>", "'no.png'"],
    ),
    "mesh without name": (visual("<geometry><mesh/></geometry>"), ["visual 0 <mesh>", "no filename"]),
    "mesh missing": (mesh("gone.stl"), ["bad.urdf", "link 'base' visual 0", "'gone.stl'"]),
    "mesh of unknown kind": (mesh("notes.txt"), ["notes.txt", "unknown kind of mesh", ".dae"]),
    "mesh scale of zero": (mesh("cube.stl", 'scale="0 1 1"'), ["<mesh>", "scale", "zero"]),
    "mesh scale absurd": (mesh("cube.stl", 'scale="1e5 1e5 1e5"'), ["visual 0", "'cube.stl'", "scale"]),
    "mesh cut short": (mesh("short.stl"), ["short.stl", "empty or broken"]),
    "mesh is text": (mesh("text.dae"), ["text.dae", "broken DAE"]),
    "mesh without triangles": (mesh("points.obj"), ["points.obj", "no triangle"]),
    "mesh with NaN": (mesh("nan.obj"), ["nan.obj", "NaN"]),
    "mesh with entities": (mesh("bomb.dae"), ["bomb.dae", "refused"]),
    "mesh is an LFS pointer": (mesh("lfs.stl"), ["lfs.stl", "Git LFS"]),
    "unknown package": (mesh("package://nobody/a.stl"), ["bad.urdf", "package 'nobody'", "ROS_PACKAGE_PATH"]),
    "out of the package": (mesh("package://here/../../../etc/hosts.stl"), ["leads out of package 'here'"]),
    "out of the folder": (mesh("../../../../../../../etc/hosts.stl"), ["leads out of the description's folder"]),
    "not in the package": (mesh("package://here/gone.stl"), ["'package://here/gone.stl'", "package 'here'"]),
    "unknown scheme": (mesh("https://example.org/a.stl"), ["https://", "package://"]),
    "absolute file missing": (mesh("file:///no/where/a.stl"), ["bad.urdf", "no file 'file:///no/where/a.stl'"]),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package called ``here`` with a few meshes, most of them broken."""
    monkeypatch.setenv("KINESPLAT_CACHE", str(tmp_path / "cache"))
    here = tmp_path / "deep" / "enough" / "here"
    here.mkdir(parents=True)
    cube = trimesh.creation.box((1.0, 1.0, 1.0))
    cube.export(here / "cube.stl")
    (here / "short.stl").write_bytes((here / "cube.stl").read_bytes()[:200])
    (here / "notes.txt").write_text("hello")
    (here / "text.dae").write_text("hello")
    (here / "points.obj").write_text("v 0 0 0\nv 1 0 0\n")
    (here / "nan.obj").write_text("v 0 0 nan\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    (here / "bomb.dae").write_text(BILLION_LAUGHS)
    (here / "lfs.stl").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    return here


def assert_one_line(call: Callable[[], object], words: list[str]) -> None:
    with pytest.raises(DescriptionError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 900
    assert all(word in message for word in words), message


@pytest.mark.parametrize("case", URDF)
def test_broken_urdf(folder: Path, case: str, capfd: pytest.CaptureFixture[str]) -> None:
    text, words = URDF[case]
    path = folder / "bad.urdf"
    path.write_text(text)
    assert_one_line(lambda: load_description(path), words)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["stl", "obj", "ply", "glb", "dae"])
def test_damaged_meshes_load_or_are_refused(folder: Path, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Random damage to a mesh file never surfaces as anything but a DescriptionError."""
    rng = np.random.default_rng(0)
    trimesh.creation.icosphere(subdivisions=1).export(folder / f"whole.{kind}")
    whole = (folder / f"whole.{kind}").read_bytes()
    path = folder / "bad.urdf"
    path.write_text(mesh(f"damaged.{kind}"))
    messages = []
    for _ in range(60):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), size=rng.integers(1, 5)):
            data[place] = rng.integers(0, 256)
        start = rng.integers(0, len(data))
        del data[start : start + rng.integers(0, 80)]
        (folder / f"damaged.{kind}").write_bytes(bytes(data))
        try:
            load_description(path)
        except DescriptionError as error:
            messages.append(str(error))
    assert len(messages) > 5
    assert not any("\n" in message for message in messages)
    assert capfd.readouterr() == ("", "")


BODY = '<mujoco><worldbody><body name="b">{}<geom size="1"/></body></worldbody>{}</mujoco>'
MJCF = {
    "entities": (BILLION_LAUGHS.replace("robot", "mujoco"), ["bad.xml", "entities"]),
    "unknown element": (BODY.format("<hinge/>", ""), ["bad.xml", "hinge"]),
    "unknown attribute": (BODY.format('<joint kind="hinge"/>', ""), ["bad.xml", "kind"]),
    "joint twice": (BODY.format('<joint name="j"/><joint name="j" axis="0 1 0"/>', ""), ["bad.xml", "'j'"]),
    "limits reversed": (BODY.format('<joint name="j" range="1 -1" limited="true"/>', ""), ["bad.xml", "range", "'j'"]),
    "missing mesh": (BODY.format('<geom type="mesh" mesh="gone"/>', ""), ["bad.xml", "gone"]),
    "missing include": (BODY.format("", '<include file="gone.xml"/>'), ["bad.xml", "gone.xml"]),
    "includes itself": (BODY.format("", '<include file="bad.xml"/>'), ["bad.xml"]),
    "equality of unknown joint": (
        BODY.format('<joint name="j"/>', '<equality><joint joint1="x" joint2="j"/></equality>'), ["bad.xml", "'x'"],
    ),
    "sdf": ("<sdf/>", ["bad.xml", "<sdf>"]),
    "empty": ("", ["bad.xml", "empty"]),
}  # fmt: skip


@pytest.mark.parametrize("case", MJCF)
def test_broken_mjcf(folder: Path, case: str) -> None:
    text, words = MJCF[case]
    path = folder / "bad.xml"
    path.write_text(text)
    assert_one_line(lambda: load_description(path), words)


def test_other_kinds_of_file(folder: Path) -> None:
    (folder / "robot.step").write_text("ISO-10303-21;")
    assert_one_line(lambda: load_description(folder / "robot.step"), ["robot.step", "'.step'", ".urdf"])
    assert_one_line(lambda: load_description(folder), ["here", "folder"])
    assert_one_line(lambda: load_description(folder / "gone.urdf"), ["gone.urdf", "no such file"])


def test_broken_xacro(folder: Path) -> None:
    pytest.importorskip("xacro", reason="needs xacro (extra 'descriptions')")
    path = folder / "bad.xacro"
    for text, words in (
        ('<robot name="r" xmlns:xacro="http://www.ros.org/wiki/xacro"><link name="${1/0}"/></robot>', ["bad.xacro"]),
        ('<robot name="r" xmlns:xacro="http://www.ros.org/wiki/xacro"><xacro:no_macro/></robot>', ["no_macro"]),
        ('<robot name="r"><link', ["bad.xacro"]),
    ):
        path.write_text(text)
        assert_one_line(lambda: load_description(path), words)


def test_missing_extras_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "r.xacro").write_text(robot('<link name="a"/>'))
    monkeypatch.setitem(sys.modules, "xacro", None)
    assert_one_line(lambda: load_description(folder / "r.xacro"), ["r.xacro", "kinesplat[descriptions]"])


def test_long_chain_does_not_overflow(folder: Path) -> None:
    links = "".join(f'<link name="l{i}"/>' for i in range(900))
    joints = "".join(
        joint("continuous", f'<parent link="l{i}"/><child link="l{i + 1}"/>', name=f"j{i}") for i in range(899)
    )
    (folder / "long.urdf").write_text(robot(links + joints))
    assert load_description(folder / "long.urdf").tree.dof == 899
    longer = joints + joint("continuous", '<parent link="l899"/><child link="m0"/>', name="k")
    longer += "".join(f'<link name="m{i}"/>' for i in range(200)) + "".join(
        joint("fixed", f'<parent link="m{i}"/><child link="m{i + 1}"/>', name=f"m{i}") for i in range(199)
    )
    (folder / "longer.urdf").write_text(robot(links + longer))
    assert_one_line(lambda: load_description(folder / "longer.urdf"), ["1000 joints away"])
    many = "".join(f'<link name="l{i}"/>' for i in range(6000))
    (folder / "many.urdf").write_text(robot(many))
    assert_one_line(lambda: load_description(folder / "many.urdf"), ["6000 links"])


def test_there_are_enough_of_them() -> None:
    assert len(URDF) + len(MJCF) >= 60
