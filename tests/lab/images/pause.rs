//! Holds a pod's namespaces: sleeps until it is killed. As process 1 it would have to reap; CRI sandboxes share no processes.

fn main() {
    loop {
        std::thread::park();
    }
}
