//! placeholder until the controllers land
use clap::Args;
/// x
#[derive(Args, Debug)]
pub(crate) struct UpArgs {}
pub(crate) fn up(_: UpArgs) -> anyhow::Result<()> {
    anyhow::bail!("wip")
}
pub(crate) fn demo(_: UpArgs) -> anyhow::Result<()> {
    anyhow::bail!("wip")
}
