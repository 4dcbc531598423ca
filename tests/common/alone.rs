//! One node that is a cluster of its own.

use tempfile::TempDir;

use super::{NodeOptions, NodeProcess, init_alone};

/// A node in its own directory.
pub struct Node {
    pub process: NodeProcess,
    _dir: TempDir,
}

impl Node {
    pub fn start(config: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config_file = dir.path().join("Config.toml");
        std::fs::write(&config_file, config).unwrap();
        let mut options = NodeOptions::new(1, dir.path().join("data"));
        options.config_file = Some(config_file);
        Self { process: NodeProcess::start(&options), _dir: dir }
    }

    pub fn ready(config: &str) -> Self {
        let node = Self::start(config);
        init_alone(node.http());
        node
    }

    pub fn http(&self) -> &str {
        self.process.http()
    }
}
