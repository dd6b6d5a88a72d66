//! Puts functions that run while nothing happens side by side.

fn main() {
    edgemesh_function_order::link_in_order();
}
