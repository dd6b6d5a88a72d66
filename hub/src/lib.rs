//! The cloud side of the mesh: what runs beside the cluster's API, or with `--standalone` in its place.

pub mod controllers;
