//! The scenes that must always work, each as a person would try it with `./lab`. `make demo` narrates them; the test suite runs the same ones.

pub mod play;
pub mod scenes;
pub mod stage;

pub use stage::Stage;
