#!/usr/bin/env python3
"""Writes fields.txt: the field numbers of Kubernetes' protobuf encoding, for the kinds that the API serves.

The numbers and names are those of the Kubernetes API itself; they never change for a published version. Needed again only
when a kind is added: generate.py <k8s.io/api folder> <k8s.io/apimachinery folder> > fields.txt
"""
import re
import sys

api, machinery = sys.argv[1], sys.argv[2]
PACKAGES = {
    "core": f"{api}/core/v1/types.go",
    "apps": f"{api}/apps/v1/types.go",
    "coordination": f"{api}/coordination/v1/types.go",
    "discovery": f"{api}/discovery/v1/types.go",
    "events": f"{api}/events/v1/types.go",
    "autoscaling": f"{api}/autoscaling/v1/types.go",
    "policy": f"{api}/policy/v1/types.go",
    "meta": f"{machinery}/pkg/apis/meta/v1/types.go",
}
ROOTS = """core.Pod core.Service core.ConfigMap core.Secret core.Namespace core.ServiceAccount core.Node core.Event core.Binding
apps.Deployment apps.ReplicaSet coordination.Lease discovery.EndpointSlice events.Event autoscaling.Scale policy.Eviction
meta.DeleteOptions""".split()
ALIASES = {"v1": "core", "metav1": "meta", "corev1": "core"}
SCALARS = {"string": "s", "bool": "b", "int32": "i", "int64": "i", "int": "i", "byte": "y", "float64": "f", "types.UID": "s"}
SPECIAL = {
    "meta.Time": "T", "meta.MicroTime": "M", "resource.Quantity": "Q", "intstr.IntOrString": "I", "meta.FieldsV1": "R",
}

structs, aliases = {}, {}
for package, path in PACKAGES.items():
    source = open(path).read()
    for name, body in re.findall(r"^type (\w+) struct \{\n(.*?)^\}", source, re.S | re.M):
        structs[f"{package}.{name}"] = body
    for name, target in re.findall(r"^type (\w+) ([\w\[\].*]+)$", source, re.M):
        aliases[f"{package}.{name}"] = target


def resolve(package, go):
    """The one-letter type, or message name, of a Go type; with [] for lists and {} for maps."""
    if go == "[]byte":
        return "y"
    if go.startswith("[]"):
        return "[]" + resolve(package, go[2:].lstrip("*"))
    if go.startswith("map["):
        return "{}" + resolve(package, go.split("]", 1)[1])
    if go in SCALARS:
        return SCALARS[go]
    if "." in go:
        prefix, name = go.split(".")
        full = f"{ALIASES.get(prefix, prefix)}.{name}"
    else:
        full = f"{package}.{go}"
    if full in SPECIAL:
        return SPECIAL[full]
    if full in aliases:
        return resolve(full.split(".")[0], aliases[full])
    if full not in structs:
        raise SystemExit(f"unknown type {full}")
    return full


def fields(message):
    package = message.split(".")[0]
    for line in structs[message].splitlines():
        found = re.match(r"\s*(?:(\w+)\s+)?(\*?[\w.\[\]*]+)\s+`(.*)`", line)
        if not found:
            continue
        _, go, tags = found.groups()
        number = re.search(r'protobuf:"\w+,(\d+),', tags)
        if not number:
            continue
        json = re.search(r'json:"([^"]*)"', tags).group(1).split(",")
        flag = "*" if go.startswith("*") else "^" if "inline" in json else "?" if "omitempty" in json else ""
        yield json[0] or "-", number.group(1), flag + resolve(package, go.lstrip("*"))


seen, todo, lines = set(), list(ROOTS), []
while todo:
    message = todo.pop()
    if message in seen:
        continue
    seen.add(message)
    own = list(fields(message))
    lines.append(" ".join([message] + [f"{name}:{number}:{kind}" for name, number, kind in own]))
    todo += [m for m in (re.sub(r"^[*?^]?(\[\]|\{\})*", "", kind) for _, _, kind in own) if "." in m]
print("\n".join(sorted(lines)))
