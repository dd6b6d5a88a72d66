//! Reads whole hash maps, hundreds of elements with one system call (bpf(2), `BPF_MAP_LOOKUP_BATCH`). Element by element takes
//! two calls each, and begins anew when the one at which it stands is removed.

use std::{
    io,
    marker::PhantomData,
    os::fd::{AsFd as _, AsRawFd as _},
};

use aya::{
    Pod,
    maps::{MapData, MapError, MapType},
    util::nr_cpus,
};

/// Elements that are read at once.
const BATCH: usize = 512;
/// Command of bpf(2).
const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;

/// `union bpf_attr` for `BPF_MAP_LOOKUP_BATCH`.
#[repr(C)]
struct LookupBatch {
    position: u64,
    next: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: i32,
    element_flags: u64,
    flags: u64,
}

/// A hash map.
#[derive(Debug)]
pub(super) struct Batches<K, V> {
    map: MapData,
    /// How many values an element has: one, or one for each CPU.
    values: usize,
    elements: PhantomData<(K, V)>,
}

impl<K: Pod, V: Pod> Batches<K, V> {
    /// A map with keys and values of these types.
    ///
    /// # Errors
    /// When it is of another kind.
    pub(super) fn new(map: MapData) -> Result<Self, MapError> {
        // The kernel rounds the size of each CPU's value up to this.
        const { assert!(size_of::<V>().is_multiple_of(8)) };
        let info = map.info()?;
        let values = match info.map_type()? {
            MapType::PerCpuHash => nr_cpus().map_err(|(_, error)| MapError::IoError(error))?,
            MapType::LruHash => 1,
            other => return Err(MapError::InvalidMapType { map_type: other as u32 }),
        };
        match (info.key_size() as usize, info.value_size() as usize) {
            (size, _) if size != size_of::<K>() => Err(MapError::InvalidKeySize { size, expected: size_of::<K>() }),
            (_, size) if size != size_of::<V>() => Err(MapError::InvalidValueSize { size, expected: size_of::<V>() }),
            _ => Ok(Self { map, values, elements: PhantomData }),
        }
    }

    /// Calls `each` with every element: its key, and its value, or those on each CPU.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(super) fn each(&self, mut each: impl FnMut(K, &[V])) -> io::Result<()> {
        let mut keys: Vec<K> = Vec::with_capacity(BATCH);
        let mut values: Vec<V> = Vec::with_capacity(BATCH * self.values);
        // Number of the bucket to go on with; each call leads further.
        let (mut position, mut next) = (0_u64, 0_u64);
        loop {
            let mut request = LookupBatch {
                position: if position == 0 { 0 } else { &raw const position as u64 },
                next: &raw mut next as u64,
                keys: keys.as_mut_ptr() as u64,
                values: values.as_mut_ptr() as u64,
                count: BATCH as u32,
                map: self.map.fd().as_fd().as_raw_fd(),
                element_flags: 0,
                flags: 0,
            };
            // SAFETY: the command reads and writes as many bytes as the structure has. For a map of this type it writes a
            // number of four bytes to `next`, and to the others as many keys and values as they have room for.
            let result = unsafe {
                libc::syscall(libc::SYS_bpf, BPF_MAP_LOOKUP_BATCH, &raw mut request, size_of::<LookupBatch>())
            };
            let last = match io::Error::last_os_error() {
                _ if result == 0 => false,
                error if error.raw_os_error() == Some(libc::ENOENT) => true,
                error => return Err(error),
            };
            let count = BATCH.min(request.count as usize);
            // SAFETY: the kernel has written so many elements, and any bytes are a value of these types.
            unsafe {
                keys.set_len(count);
                values.set_len(count * self.values);
            }
            for (key, values) in keys.iter().zip(values.chunks_exact(self.values)) {
                each(*key, values);
            }
            if last {
                return Ok(());
            }
            position = next;
        }
    }
}
